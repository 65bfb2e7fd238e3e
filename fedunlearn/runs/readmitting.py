"""Give a new run the images of clients that it takes back; those of other forgotten clients stay away."""

from collections.abc import Sequence
from logging import getLogger

import numpy as np

from fedunlearn.build import deal_of, slices_of, source_of, unpacked_of
from fedunlearn.composing import state_home
from fedunlearn.config import Config
from fedunlearn.data import unpacked
from fedunlearn.data.datasets import Source
from fedunlearn.data.owned import OwnedSource, removed_from
from fedunlearn.data.removal import remove_folder
from fedunlearn.data.store import Dataset, write
from fedunlearn.data.unpacked import note_needed
from fedunlearn.errors import UserError
from fedunlearn.runs.lock import lock
from fedunlearn.runs.sharing import studies, users_of

LOCK_SECONDS = 600

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
    data = state_home(config.home) / "data"
    with lock(data, of=f"the folder {data}", patience=LOCK_SECONDS):
        source = _unpacked_again(config, source_of(config), back)
        if not source.store.is_dir():
            return
        if isinstance(source, OwnedSource):
            names = {client: source.clients[client] for client in back}
            source.take_back(names[c] for c in back if c in config.readmit or source.has_files(names[c]))
        elif source.opened().removed:
            _decode_again(config, source, back)


def _decode_again(config: Config, source: Source, back: Sequence[int]) -> None:
    """Write a decoded copy anew with the images of some clients. No other image comes back, or becomes another's.

    Runs that began without them may have dealt out the rest, so everybody's deal is kept.
    """
    store, home = source.store, state_home(config.home)
    dataset = source.opened()
    left = slices_of(config, dataset)
    if source.store.is_symlink():  # files were deleted, and the copy has another name now
        if gone := [client for client in config.readmit if not len(left[client])]:
            raise UserError(f"readmit={gone}: the files with the images of client {gone[0]} were deleted")
        return
    whole = Dataset.in_memory(decoded := source.decode())
    here, own = dataset.places_in(whole), slices_of(config, whole)
    is_kept = np.isin(np.arange(len(whole.train.labels)), here)
    if any(not np.array_equal(all_[is_kept[all_]], here[rest]) for all_, rest in zip(own, left, strict=True)):
        return  # these clients are others: they were dealt what was left
    coming = np.concatenate([own[client] for client in back])
    if is_kept[coming].all():
        return
    if used := [name for name, data in studies(home) if data == dataset.fingerprint]:
        raise UserError(f"study {used[0]} uses {store} without these images: name another --home, or delete the study")
    deals = {user.deal: [here[places] for places in user.slices] for user in users_of(store.resolve(), home)}
    log.info("%s is written anew: it has images of forgotten clients again", store)
    is_kept[coming] = True
    note_needed(store, decoded.files)
    remove_folder(store)
    write(store, decoded)
    source.opened().without(~is_kept, deals | {deal_of(config): own})


def _unpacked_again(config: Config, source: Source | OwnedSource, back: Sequence[int]) -> Source | OwnedSource:
    """Unpack an archive again where files of some clients were deleted; those of other owners stay away."""
    folder = unpacked_of(config)
    if not folder or unpacked.is_whole(folder):
        return source
    if not isinstance(source, OwnedSource):
        if source.store.is_dir() and all(len(slices_of(config, source.opened())[client]) for client in back):
            return source
        unpacked.forget_deletions(folder, source.store.name)
        return source_of(config)
    names, removed = {source.clients[client] for client in back}, removed_from(source.root, source.store.parent)
    if not names & removed:
        return source
    unpacked.forget_deletions(folder)
    again = source_of(config)
    assert isinstance(again, OwnedSource)
    unpacked.delete(again.root / image.file for name in removed - names for image in again.owned.images.get(name, []))
    return again
