"""Forget requests between rounds of federated averaging: what all strategies share."""

import json
import time
from typing import Any, ClassVar

from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.federation import log_lines as lines
from fedunlearn.federation import messages as wire
from fedunlearn.federation.nodes import Answer, NoAnswerError
from fedunlearn.federation.rounds import Rounds
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.runs.ledger import FORGOTTEN, OPEN, Request, State
from fedunlearn.unlearning import batch_norm, retrain_estimate
from fedunlearn.unlearning.pruning import prune_clients

RECEIPT = {
    "after", "attempts", "before", "clients", "completed_round", "costs", "kind", "not_before", "reason",
    "recovers_until", "request", "round", "seconds", "stored_bytes", "strategy",
}  # fmt: skip  # what a receipt, or its row of metrics, says of every request


class Forgetting(Rounds):
    """Rounds whose model forgets clients in between.

    Before the next round every open request of the run's ledger is served: `forget` changes the model, commit. From
    then on no message asks anything of the leaving clients. How the model forgets is what a strategy adds: it overrides
    `forget`, and nothing else that it need not.

    Attributes:
        reads: the settings below `unlearn` that `forget` depends on.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def start(self, grid: Grid, num_rounds: int) -> Result:
        """Train `num_rounds` rounds (`Rounds.start`), or more where a request has still to recover."""
        self._trains, self._last = num_rounds > 0, self.round + num_rounds
        return super().start(grid, max(num_rounds, self._recovery_left()))

    def serve_requests(self, grid: Grid, *, no_more_rounds: bool = False) -> None:
        """Carry every open request as far as it can be carried now, the oldest first."""
        scheduled = set(self.config.forget.schedule.get(self.round, []))
        asked = {client for request in self.run.ledger.requests() for client in request.clients}
        if scheduled - asked:
            self.run.ledger.file(scheduled - asked)
        for request in self.run.ledger.requests():
            # what was asked for during a round waits for that round's end, also where a crash repeats the round
            waits = self._trains and request.detail["not_before"] > self.round and not no_more_rounds
            if request.state in OPEN and not waits:
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
        if self.never_trained.issuperset(request.clients):
            client = request.clients[0]
            reason = f"client {client} has {self.federation.examples[client]} examples and was never trained on"
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
            What the receipt should say, as JSON can hold it and under names of its own.

        Raises:
            NoAnswerError, ValueError: it could not be done now; the model is restored and the request tried again.
        """
        raise NotImplementedError

    def _forget(self, request: Request, grid: Grid) -> Request:
        """Forget and commit; or count a failed attempt. Clients that were never trained on left nothing to forget."""
        leaving = sorted({*request.clients} - self.never_trained)
        before, started = self.evaluate(grid, forgotten=leaving), time.monotonic()
        costs: dict[str, dict[str, float]] = {}
        stored = self.stored_bytes()
        try:
            said = self.forget(leaving, grid, costs)
        except (NoAnswerError, ValueError) as error:
            self.server.restore()
            return self._failed(request, str(error))
        self._check(said)
        prune_clients(self.model, request.clients)
        self.server.cut_off()
        receipt = {
            "round": self.round,
            "recovers_until": self._recovers_until(),
            "strategy": self.config.strategy,
            "seconds": time.monotonic() - started,
            "costs": costs,
            "stored_bytes": stored,
            "before": before,
        }
        return self.server.commit(self.round, request, **receipt, **said)

    def _check(self, said: dict[str, Any]) -> None:
        """UserError where a receipt cannot hold what `forget` returned."""
        if taken := sorted(said.keys() & RECEIPT):
            raise UserError(f"{type(self).__name__}.forget returned {taken[0]!r}, which a receipt says by itself")
        try:
            json.dumps(said)
        except (TypeError, ValueError) as error:
            raise UserError(f"{type(self).__name__}.forget returned what a receipt cannot hold: {error}") from None

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

    def _recovers_until(self) -> int:
        """The round with which a request that is served now is complete: the run's last one, if it trains any."""
        end = self.round + self.config.unlearn.recovery_rounds
        return min(end, self._last) if self._trains else end

    def _recovery_left(self) -> int:
        """Rounds until the last open request has had its `unlearn.recovery_rounds`."""
        requests = [request.detail for request in self.run.ledger.requests() if request.state in OPEN]
        return max(
            (detail.get("recovers_until", self._recovers_until()) - self.round for detail in requests), default=0
        )

    def stored_bytes(self) -> int:
        """What is kept for requests to come, beside the model: answers on unseen images."""
        return sum(answers.nbytes for answers in self.server.answers.values())

    # --- What strategies are made of ----------------------------------------------------------------------------

    def ask(
        self,
        kind: str,
        grid: Grid,
        clients: list[int],
        costs: dict[str, Any],
        name: str,
        *,
        like: dict[str, Tensor] | None = None,
        round_: int | None = None,
        everybody: bool = False,
        **content: Any,
    ) -> Answer:
        """A sweep over `clients`, who get `self.model`; what it cost is added to `costs` under `name`.

        Args:
            like: names and shapes of what every node sends, if tensors.
            round_: that the messages name; the present one by default.
            content: further content of the messages (`Federation.ask`).

        Raises:
            NoAnswerError: nobody answered; or, of `everybody`, not all.
        """
        round_ = self.round if round_ is None else round_
        answer = self.federation.ask(grid, kind, round_, clients, self.broadcast(), like or {}, **content)
        missing = sorted(set(clients) - answer.counts.keys())
        if missing and everybody:
            raise NoAnswerError(f"client {missing[0]} did not answer {kind}")
        if not answer.counts:
            raise NoAnswerError(f"no retained client answered {kind}")
        add_cost(costs, name, answer.cost)
        return answer

    def ask_to_train(
        self, kind: str, grid: Grid, clients: list[int], costs: dict[str, Any], name: str, **content: Any
    ) -> Answer:
        """`ask` for how the model's weights move in training; `self.model` does not."""
        return self.ask(kind, grid, clients, costs, name, like=wire.averaged(self.model.state_dict()), **content)

    def recover(self, grid: Grid, costs: dict[str, Any]) -> None:
        """`unlearn.recover` rounds of the retained clients at the rate `unlearn.recover_lr`."""
        for round_ in range(self.round + 1, self.round + 1 + self.config.unlearn.recover):
            rate = self.config.unlearn.recover_lr
            answer = self.ask_to_train("train", grid, self.active, costs, "recovery", round_=round_, lr=rate)
            self.server.move(self.federation.mean(answer))
            self.server.train_head(answer.moments, round_)

    def recalibrate(self, grid: Grid, costs: dict[str, Any], *, share: float = 1.0) -> None:
        """Estimate BatchNorm statistics on that share of the retained clients' images, unless switched off."""
        like = batch_norm.no_moments(self.model)
        if like and self.config.unlearn.recalibrate:
            answer = self.ask("query.moments", grid, self.active, costs, "moments", like=like, share=share)
            batch_norm.recalibrate(self.model, answer.sums)

    def renew_head(self, grid: Grid, costs: dict[str, Any]) -> None:
        """Train the client head from the retained clients' embeddings as they now are, where the server trains it."""
        if self.worker.server_trains_head:
            answer = self.ask("query.embeddings", grid, self.active, costs, "embeddings")
            self.server.train_head(answer.moments, self.round)

    def counts_of(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[int, Counts]:
        """What each of the leaving clients gets right under the current model, which it counts."""
        return self.ask("evaluate", grid, leaving, costs, "evaluations", everybody=True).counts

    def foretold(self, said: Predictions) -> Predictions:
        """What a model that saw the active clients alone would say of the server's unseen images, as far as one can
        know without it (`unseen.foretold`): of the classes that those who leave had much of, what an earlier one said,
        and less often these classes.

        Args:
            said: by the current model.
        """
        gone = self.run.ledger.clients_in(FORGOTTEN)
        trained_on = self.federation.examples.keys() - self.never_trained - set(gone)
        everybody, staying = self.worker.class_mix(trained_on), self.worker.class_mix(self.active)
        rounds = {int(round_): probs.cpu() for round_, probs in self.server.answers.items()}
        rounds[self.round] = said.class_probs
        return said._replace(class_probs=retrain_estimate.foretold(rounds, said.class_labels, everybody, staying))

    def foretold_accuracy(self, leaving: list[int]) -> float:
        """Of that model on images of the leaving clients' class mix."""
        return self.foretold(self.worker.predict_test()).expected_accuracy(self.worker.class_mix(leaving))

    def accuracy_on_test(self) -> float:
        """Of the current model."""
        return self.worker.predict_test().total.class_accuracy


def add_cost(costs: dict[str, Any], name: str, cost: dict[str, float]) -> None:
    """Add a sweep's cost to those of that name, and count them: sums, but for numbers of workers and their memory."""
    largest, cost = ("workers", "worker_mebibytes"), cost | {"sweeps": 1}
    before = costs.get(name, dict.fromkeys(cost, 0))
    costs[name] = {key: max(before[key], v) if key in largest else before[key] + v for key, v in cost.items()}
