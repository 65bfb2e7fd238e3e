"""Which runs and studies use a decoded copy of images, and which of the images they need."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedunlearn.build import deal_of, slices_of, source_of
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.runs.home import all_runs
from fedunlearn.runs.run import Run


class User(NamedTuple):
    """A run that uses a decoded copy.

    Attributes:
        name: of the run.
        deal: names how it deals images out.
        slices: each client's indices.
        without: the clients that it does without.
    """

    name: str
    deal: str
    slices: list[np.ndarray]
    without: set[int]

    def rows(self, clients: Collection[int]) -> np.ndarray:
        """Give the indices of some clients' images."""
        return np.concatenate([np.empty(0, np.int64), *(self.slices[client] for client in clients)])

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
        users.append(User(run.name, deal_of(config), slices_of(config, dataset), run.ledger.purged_clients()))
    return users


def sharing(store: Path, home: Path) -> Iterator[Run]:
    """Open the runs of a state folder that use a copy, one at a time."""
    return (run for run in opened_runs(home) if store_of(run) == store)


def opened_runs(home: Path) -> Iterator[Run]:
    """Open all runs of a state folder, one at a time; a damaged one ends it, since nobody knows what it needs."""
    for folder in all_runs(home):
        run = Run.opened(folder)
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
