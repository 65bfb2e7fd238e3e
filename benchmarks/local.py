"""Federations in this process, for measurements: a run in a temporary folder, on a node a client."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedunlearn.apps import client_app
from fedunlearn.apps.registry import strategy_of
from fedunlearn.config import Config
from fedunlearn.federation.client import Worker
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.requests import Forgetting
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run


@contextmanager
def federation(config: Config, *, without: Iterable[int] = ()) -> Iterator[tuple[Forgetting, LocalGrid]]:
    """A strategy that has trained all rounds, where `without` never took part, and its grid."""
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        try:
            strategy = strategy_of(config.strategy)(
                Run(Path(folder), config, ledger), Worker(config), log=lambda _: None
            )
            grid = LocalGrid(config.clients, client_app.app)
            if without:
                ledger.file(without)
            strategy.start(grid, config.rounds)
            yield strategy, grid
        finally:
            ledger.close()
