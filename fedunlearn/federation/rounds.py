"""Federated averaging that is resumed where it was stopped."""

import math
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedunlearn.config import Forget, to_json
from fedunlearn.errors import UserError
from fedunlearn.federation import log_lines as lines
from fedunlearn.federation import messages as wire
from fedunlearn.federation.client import Worker
from fedunlearn.federation.nodes import MOST_LISTED, Answer, Federation
from fedunlearn.federation.ordered_grid import OrderedGrid
from fedunlearn.federation.scores import Scores, scores
from fedunlearn.federation.server_state import ServerModel
from fedunlearn.nn.evaluate import Predictions
from fedunlearn.runs.ledger import FORGOTTEN, State
from fedunlearn.runs.run import Run


class Rounds(FedAvg):
    """FedAvg in Flower's loop, a round of which is one transaction: train, add up, evaluate, commit.

    At every round boundary and after the last round it serves requests (`serve_requests`).

    Args:
        run: where state is kept.
        worker: the server's own model and data; it measures what no client can: the test images, and (as an auditor
            that only a simulation can have) the forgotten clients' images.
        log: told one line a round, and of everything out of the ordinary.
        watch: called with the round after each commit of a round, and when a request has been served.
    """

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
        told = to_json(replace(run.config, forget=Forget()))  # who leaves is nobody's business
        self.federation = Federation(told, timeout=run.config.timeout, log=log)
        self.federation.moments_shape = worker.moments_shape
        self.server = ServerModel(run, worker)
        self.round = self.server.restore()
        self.started_at = self.round
        self.apart = False  # whether every client answers a round's training alone
        self._row: dict[str, Any] = {}
        self._clock = self._round_clock = time.monotonic()

    def summary(self) -> None:
        """Nothing: the server app has said it."""

    def start(self, grid: Grid, num_rounds: int) -> Result:
        """Train `num_rounds` rounds, serving requests before each and until none is open after the last."""
        self.run.ledger.reopen()
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
            raise UserError(f"round {self.round}: no client answered")
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
            said = self.worker.predict_test()
            self.server.remember(said, self.round)
            self._row |= self._scores(others, said) | {"evaluate": others.cost}
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

    def serve_requests(self, grid: Grid, *, no_more_rounds: bool = False) -> None:
        """Do what has been asked for meanwhile."""
        raise NotImplementedError

    # --- Who takes part, and how well ---------------------------------------------------------------------------

    @property
    def active(self) -> list[int]:
        """The clients that take part: those that can be trained and have no request that was taken up."""
        gone = self.run.ledger.clients_in(set(State) - {State.RECEIVED, State.REFUSED})
        return sorted(self.federation.examples.keys() - self.never_trained - set(gone))

    @property
    def never_trained(self) -> set[int]:
        """The clients without the two examples that BatchNorm needs."""
        return {client for client, examples in self.federation.examples.items() if examples < 2}

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

    def evaluate(self, grid: Grid, *, forgotten: Iterable[int] = ()) -> Scores:
        """Scores of the current model; `forgotten` are clients that are leaving just now."""
        others = self.federation.ask(grid, "evaluate", self.round, self.active, self.broadcast(), {})
        return self._scores(others, self.worker.predict_test(), forgotten)

    def _scores(self, others: Answer, said: Predictions, leaving: Iterable[int] = ()) -> Scores:
        left = {*leaving, *self.run.ledger.clients_in(FORGOTTEN)} - self.never_trained
        return scores(self.worker, others, said, sorted(left))

    def _announce(self) -> None:
        clients, nodes = self.config.clients, len(self.federation.nodes)
        more = f'; one each: --federation-config "num-supernodes={clients}", of other commands --nodes {clients}'
        self.log(f"{clients} clients on {nodes} virtual nodes{more if nodes < clients else ''}")
        if torch.cuda.is_available() and not self.federation.gpu:
            share = '--federation-config "client-resources-num-gpus=0.1", of other commands --gpus 0.1'
            self.log(f"clients run on CPUs; GPU shares: {share}")
        for client in sorted(self.never_trained):
            self.log(f"client {client} has {self.federation.examples[client]} examples: it takes no part")
