"""Which runs and studies use a decoded copy of images, and which of the images they need."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedunlearn.build import deal_of, owners_of, slices_of, source_of, unpacked_of
from fedunlearn.data import unpacked
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.runs.home import all_runs
from fedunlearn.runs.lock import lock
from fedunlearn.runs.run import Run

LOCK_SECONDS = 600

log = getLogger("fedunlearn")


class User(NamedTuple):
    """A run that uses a decoded copy.

    Attributes:
        name: of the run.
        deal: names how it deals images out.
        slices: each client's indices.
        without: the clients that it does without.
        names: of the clients, where the data set says whose its images are.
    """

    name: str
    deal: str
    slices: list[np.ndarray]
    without: set[int]
    names: list[str]

    def rows(self, clients: Collection[int]) -> np.ndarray:
        """Give the indices of some clients' images."""
        return np.concatenate([np.empty(0, np.int64), *(self.slices[client] for client in clients)])

    def owners(self, clients: Collection[int]) -> set[str]:
        """Give the names of some clients; nothing where the data set does not say whose its images are."""
        return {self.names[client] for client in clients} if self.names else set()

    @property
    def needed(self) -> np.ndarray:
        """Give the indices of the images that the run needs."""
        return self.rows([client for client in range(len(self.slices)) if client not in self.without])


def users_of(store: Path, home: Path) -> list[User]:
    """Give the runs of a state folder that use a copy.

    Raises:
        UserError: a run is damaged, so that nobody knows what it needs.
    """
    users, dataset = [], Dataset(store)
    for run in sharing(store, home):
        config = run.config_here()
        about = {"deal": deal_of(config), "slices": slices_of(config, dataset), "names": owners_of(config, dataset)}
        users.append(User(run.name, without=run.ledger.purged_clients(), **about))
    return users


def sharing(store: Path, home: Path, *, skip_damaged: bool = False) -> Iterator[Run]:
    """Open the runs of a state folder that use a copy, one at a time; the rest is as in `opened_runs`."""
    return (run for run in opened_runs(home, skip_damaged=skip_damaged) if store_of(run) == store)


def opened_runs(home: Path, *, skip_damaged: bool = False) -> Iterator[Run]:
    """Open all runs of a state folder, one at a time.

    Args:
        home: the folder.
        skip_damaged: whether to go on without those that nobody can open.

    Raises:
        UserError: one is damaged, so that nobody knows what it needs.
    """
    for folder in all_runs(home):
        try:
            run = Run.opened(folder)
        except UserError:
            if not skip_damaged:
                raise
            continue
        try:
            yield run
        finally:
            run.ledger.close()


def store_of(run: Run) -> Path | None:
    """Give the decoded copy that a run uses, if there is one; by its real path, so that copies can be compared."""
    try:
        store = source_of(run.config_here()).store
    except UserError:
        return None
    return store.resolve() if store.is_dir() else None


@contextmanager
def data_lock(home: Path) -> Iterator[None]:
    """Have the lock of a state folder's decoded copies, for which another process may have to be waited."""
    data = home / "data"
    with lock(data, of=f"the folder {data}", patience=LOCK_SECONDS):
        yield


def archive_of(run: Run) -> Path | None:
    """Give the folder that the archive of a run's images is unpacked to, if it is of one that is there."""
    try:
        return unpacked_of(run.config_here())
    except UserError:
        return None


def delete_unpacked(folder: Path, home: Path, *stores: Path) -> int:
    """Delete files of an unpacked archive that no run needs; gives how many.

    Studies keep all of them, since nobody knows from which archive they are.

    Args:
        folder: of the archive.
        home: the state folder.
        stores: decoded copies that are used too.
    """
    try:
        if any(studies(home)):
            return 0
        users = [run.config_here() for run in opened_runs(home) if archive_of(run) == folder]
        used = {source_of(config).store.resolve() for config in users} | {store.resolve() for store in stores}
        dealt = [Dataset(store) for store in used if (store / "meta.json").exists()]
        found = [dataset for dataset in dealt if dataset.is_of(dataset.listing())]
        count = unpacked.delete_unneeded(folder, used)
        for dataset in found if count else ():
            dataset.name_after(dataset.listing())
        return count
    except UserError as error:
        log.warning("no unpacked file is deleted: %s", error)
        return 0


def studies(home: Path) -> Iterator[tuple[str, str]]:
    """Give the studies of a state folder, each with the fingerprint of its images."""
    for file in (home / "studies").glob("*/study.json"):
        try:
            fingerprint = json.loads(file.read_text())["data"]
            if not isinstance(fingerprint, str):
                raise ValueError("its data has no fingerprint")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({error}): remove its folder, or put back a copy") from error
        yield file.parent.name, fingerprint
