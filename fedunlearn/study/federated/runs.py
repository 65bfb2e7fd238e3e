"""What a task of a federated study does: a run of the real strategy over the real client app, in this process."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedunlearn.apps import client_app
from fedunlearn.config import Config
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.strategy import strategy_of
from fedunlearn.log import ROUNDS
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.runs import checkpoint
from fedunlearn.runs.files import sha256_of
from fedunlearn.runs.ledger import FORGOTTEN, Ledger
from fedunlearn.runs.run import Run
from fedunlearn.study.dag.tasks import Task, TaskContext, hint
from fedunlearn.study.federated.settings import TRACE
from fedunlearn.study.pooled.scores import AllPredictions, Scores, score
from fedunlearn.study.pooled.workspace import Workspace

RUN = "run"


@dataclass(frozen=True)
class Start:
    """A base run, and the round after which another goes on from it."""

    base: Task
    round: int


@dataclass(frozen=True)
class FederatedRun:
    """Plans a federation of one node a client, from its beginning or from `start`, until round `rounds`.

    Attributes:
        config: settings of the run.
        rounds: after which it ends.
        requests: round -> clients that are forgotten after it.
        measured: rounds after which everything is measured (and the attack made), a request of that round applied.
        start: what it goes on from, if not from its beginning.
        kept: rounds whose checkpoints the task leaves.
    """

    config: Config
    rounds: int
    requests: Mapping[int, Sequence[int]]
    measured: Sequence[int] = ()
    start: Start | None = None
    kept: Sequence[int] = ()

    @property
    def asked(self) -> list[int]:
        """The clients of all requests, in the order of these."""
        return [client for clients in self.requests.values() for client in clients]


def federate(workspace: Workspace, context: TaskContext, planned: FederatedRun) -> dict[str, Any]:
    """Train and forget as planned, or go on with it where an interrupted process stopped.

    Returns:
        `scores` (rows with `round`, `forgotten` and every column), `forgets` (receipts), `rounds` (their costs),
        `files`.

    Raises:
        UserError: a request could not be applied.
    """
    with opened(context, planned) as run, only_our_lines():
        rounds = Rounds.assemble(
            run, auditor=Auditor(run.config), on_commit=lambda round_: measuring.after_commit(round_)
        )
        measuring = Measuring(workspace, context, planned, run, rounds.federation)
        current = run.ledger.current()
        if rounds.federation.round < planned.rounds or current is None or not current.finished:
            measuring.before_start()
            grid = LocalGrid(run.config.clients, client_app.app)
            rounds.start(grid, planned.rounds - rounds.federation.round)
        for request in run.ledger.requests():
            if request.state not in FORGOTTEN:
                reason = request.detail.get("reason", "")
                raise UserError(f"{context.task.name}: {request.state}, {reason}")
        return outcome(context, run, planned.kept)


@dataclass
class Measuring:
    """Measures a run after its rounds, and keeps the checkpoints that other tasks need."""

    workspace: Workspace
    context: TaskContext
    planned: FederatedRun
    run: Run
    federation: Federation

    def before_start(self) -> None:
        """Measure a base before its request, or a round that was committed and not measured.

        A commit and its measurement are two transactions: a process that is stopped between them leaves the first
        without the second, and nobody else would make it up. No clock is looked at here, so that every start gets a
        round further, however little time it has.
        """
        start, round_ = self.planned.start, self.federation.round
        if start and round_ == start.round and not self.run.ledger.clients_in(FORGOTTEN):
            columns = self._curve(self._predictions(), self.planned.asked)
            self.run.record("score", round=round_, request="before", forgotten=[], **columns)
        elif round_:
            self._measure(round_)

    def after_commit(self, round_: int) -> None:
        """Measure what is due after a round, and say how far the run is.

        Raises:
            OutOfTimeError: the time is over; the run goes on here when it is started again.
        """
        self._measure(round_)
        start = self.planned.start
        self.context.tick(round_, self.planned.rounds, "round", begun=start.round if start else 0)

    def _measure(self, round_: int) -> None:
        """Measure what is due after a round, and keep its checkpoint if another task needs it."""
        planned, forgotten = self.planned, self.run.ledger.clients_in(FORGOTTEN)
        clients = [client for client in planned.asked if client in forgotten] or planned.asked
        if round_ in planned.measured or round_ % TRACE == 0 or round_ in planned.requests:
            predictions = self._predictions()
            columns = self._curve(predictions, clients)
            if round_ in planned.measured:
                columns |= score(predictions, clients, seed=planned.config.seed)
            self.run.record("score", round=round_, request=str(forgotten), forgotten=forgotten, **columns)
        if round_ in planned.kept:
            checkpoint.save(self.context.folder / file_of(round_), self.federation.state.tensors())

    def _predictions(self) -> AllPredictions:
        return self.workspace.predictions(self.federation.model())

    def _curve(self, predictions: AllPredictions, clients: Sequence[int]) -> Scores:
        held_out = self.federation.server.predict(self.federation.model())
        class_counts = {client: self.workspace.class_counts(client) for client in clients}
        return curve(predictions, held_out, class_counts)


def curve(predictions: AllPredictions, held_out: Predictions, class_counts: Mapping[int, Any]) -> Scores:
    """Give accuracies of all clients, what held-out images of the forget clients' classes get, and losses.

    Args:
        held_out: predictions on the server's held-out images.
        class_counts: of each forget client, [K].
    """
    counts = predictions.train.counts()
    retain = sum((c for client, c in counts.items() if client not in class_counts), Counts())
    columns = {
        "retain": retain.class_accuracy,
        "id_retain": retain.client_accuracy,
        "test": held_out.total.class_accuracy,
    }
    for client, of_classes in class_counts.items():
        columns |= {
            f"client_{client}": counts[client].class_accuracy,
            f"held_out_{client}": held_out.expected_accuracy(of_classes),
            f"loss_{client}": counts[client].mean_loss,
        }
    return columns


@contextmanager
def opened(context: TaskContext, planned: FederatedRun) -> Iterator[Run]:
    """Open the task's run: new, or as an interrupted process left it."""
    folder = context.folder / RUN
    forget = planned.config.forget.model_copy(
        update={"schedule": {round_: list(clients) for round_, clients in planned.requests.items()}}
    )
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        run = Run(folder, planned.config.model_copy(update={"run": RUN, "forget": forget}), ledger)
        current = ledger.current()
        if current:
            run.delete_all_but(current.checkpoint)
        elif planned.start:
            begin_from(context, run, planned.start)
        yield run
    finally:
        ledger.close()


def begin_from(context: TaskContext, run: Run, start: Start) -> None:
    """Begin a run with a base's state, and with what the run's strategy keeps beside that."""
    base = Run(start.base.folder(context.root) / RUN, run.config, run.ledger)
    strategy_of(run.config).carry_over(base, run, start.round)
    name = file_of(start.round)
    file, sha256 = context.file(start.base, name), context.result(start.base)["files"][name]
    tensors, _ = checkpoint.read_tensors(file, sha256=sha256, hint=hint(file))
    run.commit(tensors, start.round)


@contextmanager
def only_our_lines() -> Iterator[None]:
    """Log no line a round, neither the run's own nor Flower's: a study has thousands of them."""
    levels = {ROUNDS: logging.WARNING, "flwr": logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def file_of(round_: int) -> str:
    """Name the file of a round's checkpoint."""
    return f"round-{round_:05d}.safetensors"


def outcome(context: TaskContext, run: Run, kept: Sequence[int]) -> dict[str, Any]:
    """Give what the run has measured."""
    rows = run.metrics()
    return {
        "files": {file_of(round_): sha256_of(context.folder / file_of(round_)) for round_ in kept},
        "scores": [row for row in rows if row["kind"] == "score"],
        "forgets": [row for row in rows if row["kind"] == "forget"],
        "rounds": {str(row["round"]): row["train"] for row in rows if row["kind"] == "round"},
    }
