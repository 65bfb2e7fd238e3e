"""Federated averaging that is resumed, and serves forget requests between rounds: what all strategies share."""

import math
import resource
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedunlearn import unlearn
from fedunlearn.config import to_json
from fedunlearn.errors import UserError
from fedunlearn.evaluate import Counts
from fedunlearn.ledger import FORGOTTEN, OPEN, Request, State
from fedunlearn.pruning import prune_clients
from fedunlearn.runs import Run
from fedunlearn.worker import Worker
from strategies import lines, wire
from strategies.federation import MOST_LISTED, Answer, Federation, NoAnswerError
from strategies.ordered_grid import OrderedGrid
from strategies.scores import Scores, scores
from strategies.server_model import ServerModel


class Forgetting(FedAvg):
    """FedAvg whose model forgets clients at round boundaries, and which is resumed where it was stopped.

    The loop is Flower's. A round is one transaction: train, add up, evaluate, commit. Before the next round every open
    request of the run's ledger is served: `forget` changes the model, commit. From then on no message names the leaving
    clients. How the model forgets is what a strategy adds: it overrides `forget`, and nothing else that it need not.

    Args:
        run: where state is kept.
        worker: the server's own model and data; it measures what no client can: the test images, and (as an auditor
            that only a simulation can have) the forgotten clients' images.
        log: told one line a round, and of everything out of the ordinary.
        watch: called with the round after each commit of a round, and when a request has been served.

    Attributes:
        reads: the settings below `unlearn` that `forget` depends on.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        run: Run,
        worker: Worker,
        *,
        log: Callable[[str], None] = print,
        watch: Callable[[int], None] = lambda round_: None,
    ) -> None:
        super().__init__()
        torch.set_num_threads(run.config.train.threads)  # what the server computes must not depend on its machine
        self.run, self.worker, self.config, self.log, self.watch = run, worker, run.config, log, watch
        self.model = worker.model
        self.federation = Federation(to_json(run.config), timeout=run.config.timeout, log=log)
        self.federation.moments_shape = worker.moments_shape
        self.server = ServerModel(run, worker)
        self.round = self.server.restore()
        self.started_at = self.round
        self.apart = False  # whether every client answers a round's training alone
        self._row: dict[str, Any] = {}
        self._clock = self._round_clock = time.monotonic()

    # --- Flower's hooks -----------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Nothing: the server app has said it."""

    def start(self, grid: Grid, num_rounds: int) -> Result:
        """Train `num_rounds` rounds, serving requests before each and until none is open after the last."""
        grid = OrderedGrid(grid, window=self.config.window)
        self.federation.identify(grid)
        self._announce()
        if self.round == 0 and self.run.ledger.head() is None:
            self.server.commit(0)
        self._clock = time.monotonic()
        result = super().start(grid, self.broadcast(), num_rounds, timeout=self.config.timeout)
        self.serve_requests(grid)
        while not self.run.ledger.finish():
            self.serve_requests(grid, no_more_rounds=True)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Serve the requests of this round boundary, then ask a sample of the clients to train."""
        self.serve_requests(grid)
        self._round_clock = time.monotonic()
        self.round += 1
        clients = self.sample(self.round)
        return self.federation.messages("train", self.round, clients, self.broadcast(), apart=self.apart)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up how the clients moved, and let the server's model follow (`ServerModel.step`)."""
        answer = self.federation.add_up(replies, wire.averaged(self.model.state_dict()), self.seen)
        if not answer.counts:
            raise UserError(
                f"round {self.round}: no client answered; continue from round {self.round - 1} with "
                f'overrides="run={self.run.name}"'
            )
        self.server.step(self.federation.mean(answer), answer.moments, self.round)
        total = answer.total
        self._row = {
            "round": self.round,
            "clients": sorted(answer.counts) if len(answer.counts) <= MOST_LISTED else len(answer.counts),
            "examples": total.examples,
            "train": answer.cost,
            "loss": total.mean_loss,
            "class_accuracy": total.class_accuracy,
            "client_accuracy": total.client_accuracy,
        }
        return self.broadcast(), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every client to evaluate, in the rounds that are evaluated."""
        due = self.round % self.config.evaluate_every == 0 or self.round == self.config.rounds
        return self.federation.messages("evaluate", self.round, self.active if due else [], arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Close the round: measure, write the metrics, commit, and say how it went."""
        others = self.federation.add_up(replies, {})
        if others.counts:
            self._row |= self._scores(others) | {"evaluate": others.cost}
        self._row["server_mebibytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._row["seconds"] = time.monotonic() - self._round_clock
        self.run.record("round", **self._row)
        self.server.commit(self.round)
        done = self.round - self.started_at
        left = (time.monotonic() - self._clock) / done * max(0, self.config.rounds - self.round)
        self.log(lines.progress(self._row, rounds=self.config.rounds, seconds_left=left))
        self.watch(self.round)

    def seen(self, answer: Answer) -> None:
        """Told of every reply of a round's training; a strategy may keep something of it."""

    # --- Forgetting ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> list[int]:
        """The clients that take part: those with examples enough and without a request that was taken up."""
        gone = self.run.ledger.clients_in(set(State) - {State.RECEIVED, State.REFUSED})
        return [c for c, examples in sorted(self.federation.examples.items()) if examples >= 2 and c not in gone]

    def serve_requests(self, grid: Grid, *, no_more_rounds: bool = False) -> None:
        """Carry every open request as far as it can be carried now, the oldest first."""
        scheduled = set(self.config.forget.schedule.get(self.round, []))
        asked = {client for request in self.run.ledger.requests() for client in request.clients}
        if scheduled - asked:
            self.run.ledger.file(scheduled - asked)
        for request in self.run.ledger.requests():
            # what was asked for during a round waits for that round's end, also where a crash repeats the round
            if request.state in OPEN and (request.detail["not_before"] <= self.round or no_more_rounds):
                self._serve(request, grid, no_more_rounds)

    def _serve(self, request: Request, grid: Grid, no_more_rounds: bool) -> None:
        ledger = self.run.ledger
        if request.state == State.RECEIVED:
            request = self._accept(request)
        if request.state == State.COLLECTING:
            request = self._forget(request, grid)
        if request.state == State.APPLIED:
            request = ledger.advance(request, State.RECOVERING)
            if self.config.unlearn.recovery_rounds:
                self.log(f"── request {request.id} is applied; {self.config.unlearn.recovery_rounds} rounds to recover")
        if request.state == State.RECOVERING:
            recovered = self.round - request.detail["round"]
            if recovered >= self.config.unlearn.recovery_rounds or no_more_rounds:
                self._complete(request, grid)

    def _accept(self, request: Request) -> Request:
        examples = self.federation.examples
        never_trained = [c for c in request.clients if c in examples and examples[c] < 2]
        if never_trained:
            reason = f"client {never_trained[0]} has {examples[never_trained[0]]} examples and was never trained on"
        elif not set(self.active) - set(request.clients):
            reason = "no client would be left"
        else:
            return self.run.ledger.advance(request, State.COLLECTING)
        self.log(f"── request {request.id} is refused: {reason}")
        return self.run.ledger.advance(request, State.REFUSED, reason=reason)

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Make `self.model`, in place, one that has forgotten the clients `leaving`.

        Args:
            costs: to be filled with the cost of every sweep, under its name.

        Returns:
            What the receipt should say.

        Raises:
            NoAnswerError, ValueError: it could not be done now; the model is restored and the request tried again.
        """
        raise NotImplementedError

    def _forget(self, request: Request, grid: Grid) -> Request:
        """Forget and commit; or count a failed attempt."""
        before, started = self.evaluate(grid, forgotten=request.clients), time.monotonic()
        costs: dict[str, dict[str, float]] = {}
        try:
            said = self.forget(request.clients, grid, costs)
        except (NoAnswerError, ValueError) as error:
            self.server.restore()
            return self._failed(request, str(error))
        prune_clients(self.model, request.clients)
        self.server.momentum.clear()  # a sum of past movements, the leaving clients' among them
        return self.server.commit(
            self.round,
            request,
            round=self.round,
            strategy=self.config.strategy,
            seconds=time.monotonic() - started,
            costs=costs,
            before=before,
            **said,
        )

    # --- What strategies are made of ----------------------------------------------------------------------------

    def ask_to_train(self, kind: str, grid: Grid, round_: int, clients: Iterable[int], **task: Any) -> Answer:
        """A sweep of training from `self.model`, which does not move; `task` is further content of the messages."""
        like = wire.averaged(self.model.state_dict())
        return self.federation.ask(grid, kind, round_, clients, self.broadcast(), like, **task)

    def recover(self, grid: Grid, costs: dict[str, Any]) -> None:
        """`unlearn.recover` rounds of the retained clients at the rate `unlearn.recover_lr`."""
        for round_ in range(self.round + 1, self.round + 1 + self.config.unlearn.recover):
            answer = self.ask_to_train("train", grid, round_, self.active, lr=self.config.unlearn.recover_lr)
            if not answer.counts:
                raise NoAnswerError("no retained client answered")
            add_cost(costs, "recovery", answer.cost)
            self.server.move(self.federation.mean(answer))
            self.server.train_head(answer.moments, round_)

    def recalibrate(self, grid: Grid, costs: dict[str, Any]) -> None:
        """Estimate BatchNorm statistics on the retained clients' images."""
        like = unlearn.no_moments(self.model)
        if like:
            answer = self.federation.ask(grid, "query.moments", self.round, self.active, self.broadcast(), like)
            if not answer.counts:
                raise NoAnswerError("no retained client answered the query for BatchNorm moments")
            costs["moments"] = answer.cost
            unlearn.recalibrate(self.model, answer.sums)

    def renew_head(self, grid: Grid, costs: dict[str, Any]) -> None:
        """Train the client head from the retained clients' embeddings as they now are, where the server trains it."""
        if self.worker.server_trains_head:
            answer = self.federation.ask(grid, "query.embeddings", self.round, self.active, self.broadcast(), {})
            if not answer.counts:
                raise NoAnswerError("no retained client answered the query for moments of embeddings")
            costs["embeddings"] = answer.cost
            self.server.train_head(answer.moments, self.round)

    def counts_of(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> Counts:
        """What the leaving clients get right under the current model, which they count."""
        answer = self.federation.ask(grid, "evaluate", self.round, leaving, self.broadcast(), {})
        if missing := sorted(set(leaving) - answer.counts.keys()):
            raise NoAnswerError(f"client {missing[0]} did not evaluate the model")
        add_cost(costs, "evaluations", answer.cost)
        return answer.total

    def expected_accuracy(self, clients: Iterable[int]) -> float:
        """What unseen images of these clients' class mix get from the current model."""
        return self.worker.predict_test().expected_accuracy(self.worker.class_mix(clients))

    def expected_loss(self, clients: Iterable[int]) -> float:
        """Mean class loss of unseen images of these clients' class mix under the current model."""
        return self.worker.predict_test().expected_loss(self.worker.class_mix(clients))

    def test_accuracy(self) -> float:
        """Of the current model."""
        return self.worker.predict_test().total.class_accuracy

    def _failed(self, request: Request, reason: str) -> Request:
        attempts = request.detail.get("attempts", 0) + 1
        last = attempts >= self.config.unlearn.attempts
        fate = "set aside, its clients stay out of training" if last else "tried again at the next boundary"
        self.log(f"── request {request.id}, attempt {attempts}: {reason}; {fate}")
        state = State.QUARANTINED if last else State.COLLECTING
        return self.run.ledger.advance(request, state, attempts=attempts, reason=reason)

    def _complete(self, request: Request, grid: Grid) -> None:
        receipt = {"completed_round": self.round, "after": self.evaluate(grid)}
        self.run.record("forget", request=request.id, clients=request.clients, **request.detail, **receipt)
        self.log(lines.forgotten(self.run.ledger.advance(request, State.COMPLETED, **receipt)))
        self.watch(self.round)

    def recovery_left(self) -> int:
        """Rounds until the last open request has had its `unlearn.recovery_rounds`."""
        open_requests = [request for request in self.run.ledger.requests() if request.state in OPEN]
        recovered = [self.round - request.detail.get("round", self.round) for request in open_requests]
        return max((self.config.unlearn.recovery_rounds - done for done in recovered), default=0)

    # --- Measuring ----------------------------------------------------------------------------------------------

    def evaluate(self, grid: Grid, *, forgotten: Iterable[int] = ()) -> Scores:
        """Scores of the current model; `forgotten` are clients that are leaving just now."""
        others = self.federation.ask(grid, "evaluate", self.round, self.active, self.broadcast(), {})
        return self._scores(others, forgotten)

    def _scores(self, others: Answer, leaving: Iterable[int] = ()) -> Scores:
        return scores(self.worker, others, sorted({*leaving, *self.run.ledger.clients_in(FORGOTTEN)}))

    def sample(self, round_: int) -> list[int]:
        """A share of the active clients that depends on the seed and the round alone."""
        active = self.active
        if not active:
            raise UserError(f"round {round_}: no client has two examples or more")
        size = max(1, math.ceil(self.config.fraction * len(active)))
        random = np.random.default_rng([self.config.seed, round_])
        return sorted(random.choice(active, size, replace=False).tolist())

    def broadcast(self) -> ArrayRecord:
        """The model as it travels."""
        return wire.packed(self.model.state_dict(), self.config.wire)

    def _announce(self) -> None:
        clients, nodes = self.config.clients, len(self.federation.nodes)
        hint = "" if nodes >= clients else f'; one each: --federation-config "num-supernodes={clients}"'
        self.log(f"{clients} clients on {nodes} virtual nodes{hint}")
        if torch.cuda.is_available() and not self.federation.gpu:
            self.log('clients run on CPUs; GPU shares: --federation-config "client-resources-num-gpus=0.1"')
        for client, examples in sorted(self.federation.examples.items()):
            if examples < 2:
                self.log(f"client {client} has {examples} examples: it takes no part")


def add_cost(costs: dict[str, Any], name: str, cost: dict[str, float]) -> None:
    """Add a sweep's cost to those of that name, and count them: sums, but for numbers of workers and their memory."""
    largest, cost = ("workers", "worker_mebibytes"), cost | {"sweeps": 1}
    before = costs.get(name, dict.fromkeys(cost, 0))
    costs[name] = {key: max(before[key], v) if key in largest else before[key] + v for key, v in cost.items()}
