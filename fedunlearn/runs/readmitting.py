"""Give a new run the images of clients that it takes back; those of other forgotten clients stay away."""

from collections.abc import Sequence
from logging import getLogger
from pathlib import Path

import numpy as np

from fedunlearn.build import deal_of, owners_of, slices_of, source_of, unpacked_of
from fedunlearn.composing import state_home
from fedunlearn.config import Config
from fedunlearn.data import unpacked
from fedunlearn.data.datasets import Source
from fedunlearn.data.owned import OwnedSource, removed_from
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
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
    folder = _unpacked_again(config, source, back)
    source = source_of(config)
    assert isinstance(source, Source)
    if not source.store.is_dir():
        return
    try:
        if lacking := _lacking(config, source.opened(), back):
            _bring_back(config, source, home, lacking)
    except UserError as error:
        if lacking := _lacking(config, source.opened(), config.readmit):
            raise UserError(f"readmit={lacking}: {error}") from error
        log.info("images of clients that the run leaves out stay away: %s", error)
    if folder:
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


def _unpacked_again(config: Config, source: Source, back: Sequence[int]) -> Path | None:
    """Unpack an archive again where files of some clients were deleted; gives its folder."""
    folder, is_there = unpacked_of(config), source.store.is_dir()
    if not folder or unpacked.is_whole(folder) or (is_there and not _lacking(config, source.opened(), back)):
        return None
    unpacked.forget_deletions(folder, "" if is_there else source.store.name)
    return folder


def _lacking(config: Config, dataset: Dataset, clients: Sequence[int]) -> list[int]:
    """Give those of some clients of which images were taken out of a decoded copy."""
    if not dataset.removed:
        return []
    slices, counts = slices_of(config, dataset), dataset.counts_of(deal_of(config))
    if counts is None:  # whoever deals out what is left has all of it
        counts = [config.partition.kind == "column"] * len(slices)
    return [client for client in clients if len(slices[client]) < counts[client]]


def _bring_back(config: Config, source: Source, home: Path, back: Sequence[int]) -> None:
    """Write a decoded copy anew with the images of some clients. No other image comes back, or becomes another's.

    Raises:
        UserError: nobody knows any more which images these were, their files are gone, or a study needs the copy.
    """
    if source.store.is_symlink():  # files were deleted, and the copy has another name now
        raise UserError(f"the files with the images of client {back[0]} were deleted")
    whole, store = source.in_memory(), source.store.resolve()
    with data_lock(home):
        dataset = source.opened()
        dataset.tidy()
        if not _lacking(config, dataset, back):  # another new run was first
            return
        if used := [name for name, data in studies(home) if data == dataset.fingerprint]:
            raise UserError(
                f"study {used[0]} is of {store} without the images of client {back[0]}; name another --home"
            )
        own = _in_whole(config, dataset, whole)
        kept = np.isin(np.arange(len(whole.train.labels)), dataset.places_in(whole))
        coming = np.concatenate([own[client] for client in back])
        if kept[coming].all():
            raise UserError(f"client {back[0]} was dealt what others had left, and nobody knows any more what that was")
        kept[coming] = True
        users = [run.config_here() for run in sharing(store, home, skip_damaged=True)]
        deals = {deal_of(user): _in_whole(user, dataset, whole) for user in users} | {deal_of(config): own}
        names = owners_of(config, whole)
        away = {*whole.test_owners} - {*dataset.test_owners} if dataset.test_owners else set()
        dataset.rewrite(whole, kept, deals, away - {names[client] for client in back if names})
    log.info("%s has images of forgotten clients again: of %s", store, ", ".join(map(str, back)))


def _in_whole(config: Config, dataset: Dataset, whole: Dataset) -> list[np.ndarray]:
    """Give each client's indices into all images: all that it was dealt, or what is left where nobody knows the rest.

    Nobody does where a run has dealt out what others had left.
    """
    here = dataset.places_in(whole)
    left = [here[own] for own in slices_of(config, dataset)]
    dealt = slices_of(config, whole)
    is_same = all(np.array_equal(own[np.isin(own, here)], rest) for own, rest in zip(dealt, left, strict=True))
    return dealt if is_same else left
