"""Federations in this process, for measurements: a run in a temporary folder, on a node a client."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedunlearn.apps import client_app
from fedunlearn.config import Config
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.requests import Requests
from fedunlearn.federation.rounds import Rounds
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run


@dataclass(frozen=True)
class Trained:
    """A federation that has trained all its rounds, and an auditor who may look at its clients' images."""

    run: Run
    federation: Federation
    requests: Requests
    auditor: Auditor

    def forget(self, client: int) -> None:
        """Serve a request for the client, without further rounds of training."""
        self.run.ledger.file([client])
        self.requests.serve(no_more_rounds=True)

    def evaluate(self, clients: Iterable[int]) -> Counts:
        """Count what the present model gets right on the clients' images, whoever has been forgotten."""
        params = self.federation.state.params
        return sum((self.auditor.evaluate(params, client) for client in clients), Counts())

    def class_counts(self, client: int) -> Tensor:
        """Count the client's images of each class, [K]."""
        return torch.from_numpy(self.auditor.class_counts([client])[0])

    @property
    def test_accuracy(self) -> float:
        """The present model's class accuracy on the server's held-out images, which are the test images."""
        return self.federation.predictions().total.class_accuracy


@contextmanager
def federation(config: Config, *, without: Iterable[int] = ()) -> Iterator[Trained]:
    """Train all rounds of a federation in which the clients `without` never took part."""
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.sqlite")
        try:
            run, auditor = Run(Path(folder), config, ledger), Auditor(config)
            if without:
                ledger.file(without)
            rounds = Rounds.assemble(run, auditor=auditor)
            rounds.start(LocalGrid(config.clients, client_app.app), config.rounds)
            yield Trained(run, rounds.federation, rounds.requests, auditor)
        finally:
            ledger.close()
