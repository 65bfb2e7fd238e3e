"""Give a new run the images of clients that it takes back; those of other forgotten clients stay away."""

from collections.abc import Iterable, Sequence
from logging import getLogger
from pathlib import Path

import numpy as np

from fedunlearn.build import deal_of, fingerprint_of, owners_of, slices_of, source_of, unpacked_of
from fedunlearn.composing import state_home
from fedunlearn.config import Config
from fedunlearn.data import unpacked
from fedunlearn.data.datasets import Source
from fedunlearn.data.owned import OwnedSource, removed_from
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.runs.run import Run
from fedunlearn.runs.sharing import data_lock, delete_unpacked, sharing, studies

log = getLogger("fedunlearn")


def take_back(config: Config) -> None:
    """Decode images again where those of a client are gone that a new run takes back, or is to be compared without.

    A run that never trains a client (`forget.schedule={0:[3]}`) measures its images all the same, and removes them
    again when it ends. Where the files are gone, it goes on without.

    Raises:
        UserError: the source of a client is gone too that is taken back.
    """
    back = list(dict.fromkeys([*config.readmit, *config.forget.schedule.get(0, [])]))
    if not back or config.partition.is_on_nodes:
        return
    source, home = source_of(config), state_home(config.home)
    if isinstance(source, OwnedSource):
        _take_back_parts(config, source, home, back)
        return
    try:
        source = _unpacked_again(config, source, back)
        if source.store.is_dir() and (lacking := _lacking(config, source.opened(), back)):
            _bring_back(config, source, home, lacking)
    except UserError as error:
        if config.readmit:
            raise UserError(f"readmit={config.readmit}: {error}") from error
        log.info("images of clients that the run leaves out stay away: %s", error)
    finally:
        if (folder := unpacked_of(config)) and source.store.is_dir():
            delete_unpacked(folder, home, source.store)


def _take_back_parts(config: Config, source: OwnedSource, home: Path, back: Sequence[int]) -> None:
    """Let clients have a part of the decoded copy again; their files may have to be unpacked again."""
    names, folder = {client: source.clients[client] for client in back}, unpacked_of(config)
    removed = removed_from(source.root, source.store.parent)
    if folder and not unpacked.is_whole(folder) and removed.intersection(names.values()):
        unpacked.forget_deletions(folder)
        again, away = source_of(config), removed.difference(names.values())
        assert isinstance(again, OwnedSource)
        source, images = again, again.owned.images
        unpacked.delete(again.root / image.file for name in away for image in images.get(name, []))
    if source.store.is_dir():
        with data_lock(home):
            source.take_back(names[c] for c in back if c in config.readmit or source.has_files(names[c]))


def _unpacked_again(config: Config, source: Source, back: Sequence[int]) -> Source:
    """Unpack an archive again where files of some clients were deleted.

    Raises:
        UserError: without the decoded copy nobody knows whose files were deleted.
    """
    folder = unpacked_of(config)
    if not folder or unpacked.is_whole(folder):
        return source
    if not source.store.is_dir():
        root = config.data.root
        raise UserError(
            f"files of forgotten clients in {root} stay away, and without this decoded copy nobody knows whose"
        )
    if not _lacking(config, source.opened(), back):
        return source
    unpacked.forget_deletions(folder)
    again = source_of(config)
    assert isinstance(again, Source)
    return again


def _lacking(config: Config, dataset: Dataset, clients: Sequence[int]) -> list[int]:
    """Give those of some clients of which images may have been taken out of a decoded copy."""
    if not dataset.removed:
        return []
    slices, counts = slices_of(config, dataset), dataset.counts_of(deal_of(config))
    if counts is None:  # whoever deals out what is left has all of it
        return list(clients) if config.partition.kind == "column" else []
    return [client for client in clients if len(slices[client]) < counts[client]]


def _bring_back(config: Config, source: Source, home: Path, back: Sequence[int]) -> None:
    """Write a decoded copy anew with the images of some clients. No other image comes back, or becomes another's.

    Raises:
        UserError: nobody knows any more which images these were, their files are gone, or somebody needs the copy
            without them.
    """
    if source.store.is_symlink():  # files were deleted, and the copy has another name now
        raise UserError(f"the files with the images of client {back[0]} were deleted")
    whole, store, name = source.in_memory(), source.store.resolve(), deal_of(config)
    with data_lock(home):
        dataset = source.opened()
        dataset.tidy()
        if not _lacking(config, dataset, back):  # another new run was first
            return
        if used := [study for study, data in studies(home) if data == dataset.fingerprint]:
            raise UserError(
                f"study {used[0]} is of {store} without the images of client {back[0]}; name another --home"
            )
        here = dataset.places_in(whole)
        kept = np.zeros(len(whole.train.labels), bool)
        kept[here] = True
        own, left = slices_of(config, whole), slices_of(config, dataset)
        if any(not np.array_equal(all_[kept[all_]], here[rest]) for all_, rest in zip(own, left, strict=True)):
            raise UserError(f"client {back[0]} was dealt what others had left, and nobody knows any more what that was")
        coming = np.concatenate([own[client] for client in back])
        if kept[coming].all():
            return
        unused = {deal: [here[rest] for rest in dataset.dealt(deal) or []] for deal in dataset.deals}
        deals = _deals_of(sharing(store, home, skip_damaged=True), dataset, whole, here)
        if any(len(deals[name][client]) < len(own[client]) for client in back if name in deals):
            raise UserError(f"a run has begun without the images of client {back[0]}; name another --home")
        kept[coming] = True
        names = owners_of(config, whole)
        away = {*whole.test_owners} - {*dataset.test_owners} if dataset.test_owners else set()
        dataset.rewrite(whole, kept, unused | deals | {name: own}, away - {names[client] for client in back if names})
    log.info("%s has images of forgotten clients again: of %s", store, ", ".join(map(str, back)))


def _deals_of(runs: Iterable[Run], dataset: Dataset, whole: Dataset, here: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Give each client's indices into all images, by deal: all that it had when its run began, or else what is left.

    Args:
        runs: that use the copy.
        dataset: the copy.
        whole: all images that its source gives.
        here: where those of the copy lie among them.
    """
    is_here = np.zeros(len(whole.train.labels), bool)
    is_here[here] = True
    deals: dict[str, list[np.ndarray]] = {}
    for run in runs:
        config, began = run.config_here(), run.about()["data"]
        own = slices_of(config, whole)
        mine = [here[rest] for rest in slices_of(config, dataset)]
        for client, (all_, rest) in enumerate(zip(own, mine, strict=True)):
            is_same = np.array_equal(all_[is_here[all_]], rest)
            if is_same and len(all_) > len(rest) and fingerprint_of(whole, own, client) == began.get(str(client)):
                mine[client] = all_
        earlier = deals.get(deal_of(config), mine)
        deals[deal_of(config)] = [min(pair, key=len) for pair in zip(earlier, mine, strict=True)]
    return deals
