"""Federated averaging in Flower's loop, which is resumed where it was stopped."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from logging import getLogger
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from fedunlearn.build import is_evaluated
from fedunlearn.config import Config
from fedunlearn.errors import DestroyedError, NotNowError, UserError
from fedunlearn.federation import server_state, tasks
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.nodes import Nodes
from fedunlearn.federation.ordered_grid import OrderedGrid
from fedunlearn.federation.replies import MOST_LISTED, Results
from fedunlearn.federation.requests import Requests
from fedunlearn.federation.scores import Scorer
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.federation.strategy import Strategy, strategy_of
from fedunlearn.log import ROUNDS
from fedunlearn.malloc import peak_mebibytes
from fedunlearn.runs.checkpoint import BESIDE
from fedunlearn.runs.fingerprints import fingerprints_of, forgotten_for_good, keep_fingerprints, keep_keys
from fedunlearn.runs.formats import progress
from fedunlearn.runs.ledger import COUNTED, FORGOTTEN
from fedunlearn.runs.run import Run

log = getLogger("fedunlearn")


class Rounds(FlowerStrategy):
    """The strategy that Flower runs: FedAvg, a round of which is one transaction (train, add up, evaluate, commit).

    At every round boundary and after the last round it lets `Requests` serve what was asked for. Flower passes arrays
    from hook to hook; they are a copy of what is broadcast. The truth is `federation.state`.

    Attributes:
        federation: the state, the nodes, and the server's data.
        requests: the run's forget requests.
    """

    def __init__(
        self,
        run: Run,
        federation: Federation,
        requests: Requests,
        strategy: Strategy,
        scorer: Scorer,
        *,
        on_commit: Callable[[int], None] = lambda round_: None,
    ) -> None:
        super().__init__()
        self.federation, self.requests = federation, requests
        self._run, self._config, self._strategy, self._scorer = run, run.config, strategy, scorer
        self._on_commit = on_commit
        self._started_at = federation.round
        self._sent: list[Message] = []  # what the replies that Flower hands over next are to
        self._row: dict[str, Any] = {}
        self._clock = self._round_clock = time.monotonic()

    @classmethod
    def assemble(
        cls, run: Run, *, auditor: Auditor | None = None, on_commit: Callable[[int], None] = lambda round_: None
    ) -> "Rounds":
        """Put together everything that trains and forgets in a run, from its last commit on.

        Args:
            auditor: scores the images of forgotten clients, which only a simulation can, and knows how many examples
                each client has.
            on_commit: called with the round after each commit of a round, and when a request is completed.
        """
        torch.set_num_threads(run.config.train.threads)  # what the server computes must not depend on its machine
        strategy, server = strategy_of(run.config), ServerData(run.config)
        server.leave_out(run.ledger.classes_left())
        tasks.check_tasks(type(strategy), server.model)
        server.try_loss()
        state = ServerState.from_tensors(*run.restore(server.model, beside=tuple(BESIDE.values())))
        key = run.ledger.key if run.config.partition.is_on_nodes else ""
        counted = auditor.examples() if auditor else {}
        nodes = Nodes(run.config, server.model, pixels=server.pixels, run=key, counted=counted)
        federation = Federation(run, server, nodes, state)
        federation.state = server_state.of_held_out(state, server.examples)
        scorer = Scorer(federation, auditor)
        requests = Requests(run, federation, strategy, scorer, on_commit=on_commit)
        return cls(run, federation, requests, strategy, scorer, on_commit=on_commit)

    def summary(self) -> None:
        """Say nothing: the server app has said it."""

    def start(self, grid: Grid, num_rounds: int) -> Result:  # type: ignore[override]
        """Train `num_rounds` rounds, serving requests before each and until none is open after the last."""
        num_rounds = self.requests.expect_rounds(num_rounds)
        self._run.ledger.reopen()
        self._strategy.after_request(self._run)
        grid = self.federation.grid = OrderedGrid(grid, window=self._config.window)
        nodes, ledger = self.federation.nodes, self._run.ledger
        forgotten, portions = ledger.clients_in(FORGOTTEN), ledger.portions(COUNTED).values()
        owners = {portion.client for portion in portions}  # who may have deleted files
        images = {c: sha256 for c, sha256 in fingerprints_of(self._run).items() if c not in owners}
        known = {"images": images, "gone": forgotten_for_good(self._run)}
        nodes.identify(grid, ledger.examples(), forgotten, portions, **known)
        keep_fingerprints(self._run, nodes.fingerprints)
        keep_keys(self._run, nodes.keys)
        ledger.keep_examples({c: n for c, n in nodes.examples.items() if c not in nodes.disputed})
        self.federation.split()
        self._announce()
        if self.federation.round == 0 and self._run.ledger.current() is None:
            self._commit()
        self._clock = time.monotonic()
        result = super().start(grid, self._broadcast(), num_rounds, timeout=self._config.timeout)
        self.requests.serve(is_last=True)
        while self.requests.file_carried() or not self._run.ledger.finish():
            self.requests.serve(is_last=True, no_more_rounds=True)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Serve the requests of this round boundary, then ask a sample of the clients to train."""
        self.requests.serve()
        self._round_clock = time.monotonic()
        round_ = self.federation.round + 1
        if self.federation.nodes.is_robust(tasks.train):
            self.federation.know_classes(sample(self.federation.retain, self._config, round_))
        self._sent = self._training(round_)
        return self._sent

    def _training(self, round_: int) -> list[Message]:
        """Make the messages that ask a round's clients to train, always the same."""
        clients, one_each = sample(self.federation.retain, self._config, round_), self._strategy.one_reply_each(round_)
        params = self.federation.state.params
        return self.federation.nodes.messages(tasks.train, round_, clients, params, one_client_each=one_each)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up the clients' updates, and let the state follow."""
        round_ = self.federation.round + 1
        with diverged(round_):
            results = self.federation.nodes.add_up(
                tasks.train,
                self._sent,
                replies,
                on_reply=lambda one: self._strategy.after_reply(self.federation, self._run, round_, one),
            )
            if not results.counts:
                raise UserError(f"round {round_}: no client answered")
            results = self._sound(results, round_)
            batch_norm = self.federation.apply_round(results, results.mean(), round_)
        self.federation.state = replace(self.federation.state, round=round_)
        total, clients = results.total, sorted(results.counts)
        self._row = {
            "round": round_,
            "clients": clients if len(clients) <= MOST_LISTED else len(clients),
            "examples": total.examples,
            "train": results.cost,
            "batch_norm": batch_norm,
            "loss": total.mean_loss,
            "class_accuracy": total.class_accuracy,
            "client_accuracy": total.client_accuracy,
        }
        return self._broadcast(), None

    def _sound(self, results: Results, round_: int) -> Results:
        """Give a round's results; where they would destroy the model, without the replies that do."""
        federation = self.federation

        def ask_again(on_reply: Callable[[Results], None]) -> Results:
            sent = self._training(round_)
            replies = federation.grid.send_and_receive(sent, timeout=self._config.timeout)
            return federation.nodes.add_up(tasks.train, sent, replies, on_reply=on_reply)

        try:
            kept, dropped = federation.round_gate.passed(results, round_, ask_again)
        except NotNowError as error:
            raise UserError(f"round {round_}: {error}") from error
        for one in dropped:
            self._strategy.after_refusal(self._run, round_, one)
        return kept

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every retain client to evaluate, in the rounds that are evaluated."""
        federation = self.federation
        clients = federation.retain if is_evaluated(self._config, federation.round) else []
        self._sent = federation.nodes.messages(tasks.evaluate, federation.round, clients, federation.state.params)
        return self._sent

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Close the round: measure, write the metrics, commit, and say how it went."""
        federation = self.federation
        with diverged(federation.round):
            retain = federation.nodes.add_up(tasks.evaluate, self._sent, replies)
        if retain.counts:
            predictions = federation.predictions()
            federation.state = server_state.remember(federation.state, predictions.class_probs)
            self._row |= self._scorer.of(retain, predictions) | {"evaluate": retain.cost}
        self._row["server_mebibytes"] = peak_mebibytes()
        self._row["seconds"] = time.monotonic() - self._round_clock
        self._run.record("round", **self._row)
        self._commit()
        done = federation.round - self._started_at
        left = (time.monotonic() - self._clock) / done * max(0, self._config.rounds - federation.round)
        getLogger(ROUNDS).info(progress(self._row, rounds=self._config.rounds, seconds_left=left))
        self._on_commit(federation.round)
        return None

    def _broadcast(self) -> ArrayRecord:
        return self.federation.nodes.packed(self.federation.state.params)

    def _commit(self) -> None:
        self._run.commit(self.federation.state.tensors(), self.federation.round)

    def _announce(self) -> None:
        nodes = self.federation.nodes
        log.info("%s", hosts(self._config, len(nodes.nodes), len(nodes.examples.keys() - nodes.portions.keys())))
        if torch.cuda.is_available() and not nodes.gpu:
            share = '--gpus 0.1, of flwr run --federation-config "client-resources-num-gpus=0.1"'
            log.info("clients run on CPUs; GPU fractions: %s", share)
        for client in sorted(nodes.examples.keys() - nodes.portions.keys() - self.federation.trainable):
            log.info("client %s has %d examples: it takes no part", nodes.name_of(client), nodes.examples[client])


def hosts(config: Config, nodes: int, clients: int) -> str:
    """Say on how many nodes the clients are, and in a simulation how each has a node of its own.

    Args:
        nodes: that take part.
        clients: that they have.
    """
    if config.partition.is_on_nodes:
        where = f"{nodes} machines of their own" if nodes != 1 else "one machine of its own"
        return f"{clients} clients on {where}" if clients != 1 else f"one client on {where}"
    more = f'; one each: --nodes {config.clients}, of flwr run --federation-config "num-supernodes={config.clients}"'
    return f"{config.clients} clients on {nodes} virtual nodes{more if nodes < config.clients else ''}"


@contextmanager
def diverged(round_: int) -> Iterator[None]:
    """Turn a DestroyedError into what a person can put right."""
    try:
        yield
    except DestroyedError as error:
        hint = "has training diverged? try a lower train.lr; round_band=0 looks at no held-out loss"
        raise UserError(f"round {round_}: {error} ({hint})") from error


def sample(clients: list[int], config: Config, round_: int) -> list[int]:
    """Draw a fraction of the clients, which depends on the seed and the round alone."""
    if not clients:
        why = "every client has fewer than two examples, is forgotten, or has not said which images a request means"
        raise UserError(f"round {round_}: nobody can train: {why}")
    size = max(1, math.ceil(config.fraction * len(clients)))
    random = np.random.default_rng([config.seed, round_])
    return sorted(random.choice(clients, size, replace=False).tolist())
