"""Federations in this process, for measurements: a run in a temporary folder, on a node a client."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fedunlearn import client_app
from fedunlearn.config import Config
from fedunlearn.ledger import Ledger
from fedunlearn.runs import Run
from fedunlearn.worker import Worker
from strategies.catalogue import strategy_of
from strategies.forgetting import Forgetting
from strategies.local_grid import LocalGrid


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
