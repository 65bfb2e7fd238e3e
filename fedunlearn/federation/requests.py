"""Forget requests between rounds of training: whose turn it is, what is committed, and what the receipt says."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from inspect import signature
from logging import getLogger
from typing import Any

from fedunlearn.config import Config
from fedunlearn.errors import DestroyedError, NotNowError, UserError, printable
from fedunlearn.federation import server_state
from fedunlearn.federation.gate import Gate
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.portions import NOBODY_LEFT, Portions, nothing_left
from fedunlearn.federation.replies import listed
from fedunlearn.federation.scores import Scorer, Scores
from fedunlearn.federation.strategy import Strategy, strategy_of
from fedunlearn.federation.tasks import check_tasks
from fedunlearn.federation.withdrawals import believed
from fedunlearn.naming import as_command
from fedunlearn.runs import receipts
from fedunlearn.runs.formats import forgotten
from fedunlearn.runs.hints import of_run
from fedunlearn.runs.ledger import OPEN, RECEIPT, TAKEN_UP, Ledger, Request, State
from fedunlearn.runs.run import Run
from fedunlearn.runs.signed import SignedRequest, UnsignedError, action_of, check, read

BY_ITSELF = "fedunlearn leave"
"""Who asks, where a client has asked on its own machine."""
PARAMETERS = {*signature(Run.commit).parameters, *signature(Ledger.commit).parameters}

log = getLogger("fedunlearn")


@dataclass(frozen=True)
class Attempt:
    """What a strategy has made of the model for a request, before anything of it counts.

    Attributes:
        strategy: that did it.
        figures: for the receipt, the strategy's own among them.
        verdict: of the gate; empty where it was not asked.
        after: scores of the new model; empty where the gate was not asked.
    """

    strategy: Strategy
    figures: dict[str, Any]
    verdict: dict[str, Any]
    after: Scores


class Requests:
    """The state machine of a run's forget requests.

    At every round boundary each open request of the ledger is carried as far as it can be. It is RECEIVED, COLLECTING
    (the strategy changes the state), APPLIED (one commit), RECOVERING (further rounds, if any are asked for) and
    COMPLETED. From COLLECTING on no round of training asks anything of its clients.

    Args:
        on_commit: called with the round when a request is completed.
    """

    def __init__(
        self,
        run: Run,
        federation: Federation,
        strategy: Strategy,
        scorer: Scorer,
        *,
        on_commit: Callable[[int], None] = lambda round_: None,
    ) -> None:
        self._run, self._ledger, self._settings = run, run.ledger, run.config.forget
        self._federation, self._strategy, self._scorer, self._on_commit = federation, strategy, scorer, on_commit
        self._last_round: int | None = None  # of this process's training, where it trains
        self._scores: Scores = {}  # of the model that was applied last, while it is the present one
        self._carried_at: dict[int, int] = {}  # by client, the round at which what it has signed was filed last
        self._portions = Portions(run, federation)

    def expect_rounds(self, rounds: int) -> int:
        """Learn how many rounds this process is to train; returns how many it takes to complete every open request."""
        self._last_round = self._federation.round + rounds if rounds else None
        open_ = [request.detail for request in self._ledger.requests() if request.state in OPEN]
        left = [detail.get("completes_at", self._completes_at()) - self._federation.round for detail in open_]
        return max([rounds, *left])

    def serve(self, *, is_last: bool = False, no_more_rounds: bool = False) -> None:
        """File what replies have carried, then carry every open request as far as it can be now, the oldest first.

        Args:
            is_last: the run's rounds are trained; receipts are then written by whoever removes what is left.
            no_more_rounds: requests are completed at once.
        """
        self.file_carried()
        self._portions.at_boundary()
        round_ = self._federation.round
        scheduled = set(self._settings.schedule.get(round_, []))
        asked = {c for request in self._ledger.requests() if request.state != State.CANCELLED for c in request.clients}
        if scheduled - asked:
            self._ledger.file(scheduled - asked, months=self._settings.due_months, by="forget.schedule")
        for request in self._ledger.requests():
            # what was asked for during a round waits for that round's end, also where a crash repeats the round
            waits = self._last_round is not None and request.detail["not_before"] > round_ and not no_more_rounds
            if request.state in OPEN and not waits:
                self._carry(request, no_more_rounds)
            elif request.state == State.QUARANTINED and not is_last:
                self._count_again(request)
        if not is_last:
            receipts.write_all(self._run)

    def file_carried(self) -> list[Request]:
        """File what clients have signed on their own machines and replies have carried; gives the new requests.

        Nothing else of it is written down: whoever may not ask cannot make the ledger long. Whoever may is heard once a
        round: else a client whose request the gate sets aside could ask anew without end.
        """
        nodes, ledger, round_, filed = self._federation.nodes, self._ledger, self._federation.round, []
        for node, text in nodes.withdrawals.drain():
            about = {"run": ledger.key, "owners": nodes.owners(node), "used": ledger.nonces(), "name": nodes.name_of}
            try:
                asked = believed(text, **about)
                if asked and self._carried_at.get(asked.clients[0]) != round_:
                    self._carried_at[asked.clients[0]] = round_
                    filed += self._file_carried(asked)
            except UserError as error:  # also where somebody files the same at this moment
                nodes.withdrawals.refuse(node, str(error))
        return filed

    def _file_carried(self, asked: SignedRequest) -> list[Request]:
        known = {request.id for request in self._ledger.requests()}
        months, signed = self._settings.due_months, asdict(asked)
        request = self._ledger.file(asked.clients, months=months, by=BY_ITSELF, signed=signed)[-1]
        again = f", which is {request.state}" if request.id in known else ""
        who = self._run.named(asked.clients, capital=True)
        log.info("── %s asks from its own machine to be forgotten: request %s%s", who, request.id, again)
        return [] if again else [request]

    def _carry(self, request: Request, no_more_rounds: bool) -> None:
        until_completed = self._settings.rounds_until_completed
        if request.state == State.RECEIVED:
            request = self._accept(request)
        if request.state == State.COLLECTING:
            request = self._collect(request)
        if request.state == State.APPLIED:
            request = self._ledger.advance(request, State.RECOVERING)
            if until_completed:
                log.info("── request %s is applied; %d rounds until it is completed", request.id, until_completed)
        if request.state == State.RECOVERING:
            trained = self._federation.round - request.detail["round"]
            if trained >= until_completed or no_more_rounds:
                self._complete(request)

    def _accept(self, request: Request) -> Request:
        if reason := self._unsuitable(request):
            return self._refused(request, reason)
        return self._ledger.advance(request, State.COLLECTING)

    def _count_again(self, request: Request) -> None:
        """Let those train again who were silent about a request that was set aside, and say now what it means."""
        back, reason = self._portions.count_again(request)
        if reason:
            self._refused(request, reason)
        elif back:
            who = self._federation.named(back)
            log.info("── request %s: %s said which images are meant, and can train on the others", request.id, who)

    def _with_classes(self, request: Request) -> Request:
        """Keep of a request about classes whether these leave whole with it: what earlier ones became is known now."""
        selection = request.selection
        if not (selection and selection.is_of_classes):
            return request
        takes_the_last = self._portions.takes_the_last(request, selection)
        if takes_the_last == request.detail.get("all_clients", False):
            return request
        return self._ledger.advance(request, request.state, all_clients=takes_the_last)

    def _refused(self, request: Request, reason: str) -> Request:
        log.warning("── request %s is refused: %s", request.id, reason)
        return self._ledger.advance(request, State.REFUSED, reason=reason)

    def _unsuitable(self, request: Request) -> str:
        """Say why a request cannot be taken up; nothing where it can."""
        federation, ledger = self._federation, self._ledger
        if federation.never_trained.issuperset(self._portions.whole(request)) and not request.portions:
            first = request.clients[:1]
            return nothing_left(ledger, first[0], self._run.named(first), federation.examples(first))
        if federation.trainable <= {*request.clients, *ledger.clients_in(TAKEN_UP)}:
            return NOBODY_LEFT
        return self._unsigned(request) or self._impossible(request)

    def _unsigned(self, request: Request) -> str:
        """Say why a request does not have the signature that the run asks for; nothing where it has."""
        if not self._settings.signed:
            return ""
        earlier = [
            r.detail["signed"]["nonce"] for r in self._ledger.requests() if r != request and "signed" in r.detail
        ]
        at, owners = datetime.fromisoformat(request.received_at), self._run.config.owner_keys
        signed = request.detail.get("signed")
        try:
            asked = read(signed) if signed else None
            # of the clients some may be covered by an earlier request
            clients = asked.clients if asked and set(request.owners) <= set(asked.clients) else request.owners
            action = action_of(request.selection)
            about = {"run": self._ledger.key, "owners": owners, "at": at, "used": earlier, "action": action}
            check(asked, clients, **about, name=self._federation.nodes.name_of)
        except UnsignedError as error:
            return str(error)
        return ""

    def _impossible(self, request: Request) -> str:
        """Say why the strategy that a request asks for cannot be had here; nothing where it can."""
        try:
            check_tasks(type(strategy_of(self._config_of(request))), self._federation.server.model)
        except UserError as error:
            return str(error)
        return ""

    def _config_of(self, request: Request) -> Config:
        """Give the settings that a request is applied with: the run's, or others where it asks for them."""
        return self._run.config.model_copy(update=request.detail.get("how", {}))

    def _collect(self, request: Request) -> Request:
        """Take the portions out of their clients' images that a request is about, and apply it."""
        try:
            meant, reason = self._portions.take_apart(request)
        except NotNowError as error:
            return self._failed(request, str(error))
        if not reason:
            return self._apply(self._with_classes(request), meant)
        if not self._portions.is_begun(request):
            return self._refused(request, reason)
        log.warning("── request %s is set aside: %s, %s", request.id, reason, _out(request))
        return self._ledger.advance(request, State.QUARANTINED, reason=reason)

    def _apply(self, request: Request, meant: set[int]) -> Request:
        """Let the strategy forget, and commit what passes the gate; or restore the state."""
        federation, state = self._federation, self._federation.state
        try:
            attempt = self._attempt(request, meant)
        except Exception as error:
            federation.state = state
            return self._undone(request, error)
        if attempt.verdict and not attempt.verdict["passed"] and "accepted_by" not in request.detail:
            federation.state = state
            return self._not_taken(request, attempt.verdict)
        return self._commit(request, meant, attempt)

    def _attempt(self, request: Request, meant: set[int]) -> Attempt:
        """Let the strategy forget, and the gate look at the model; nothing of it counts yet.

        The model's BatchNorm statistics are those of the retain clients before and after, so that what changes in the
        scores comes from the weights. Of clients that were never trained on there is nothing to forget.
        """
        federation, config = self._federation, self._config_of(request)
        forget = ForgetSet(tuple(sorted(meant - federation.never_trained)), frozenset(request.classes))
        stored_bytes = federation.state.stored_bytes + self._strategy.stored_bytes(self._run)
        strategy = strategy_of(config) if "how" in request.detail else self._strategy
        committed = federation.predictions()
        if not self._estimates_batch_norm(request):
            config = config.model_copy(update={"batch_norm_fraction": 0.0})
        before = self._scorer.now(forget)
        with federation.applying(forget, config):
            # a model that nobody has trained knows nobody; who takes a refused one is told what is wrong with it
            is_asked = (self._settings.gate or "accepted_by" in request.detail) and federation.round
            is_last = request.detail.get("attempts", 0) + 1 >= self._settings.attempts
            gate = Gate(federation, forget, before, committed, needs_all=not is_last) if is_asked else None
            federation.costs, started = {}, time.monotonic()
            result = self._unlearn(strategy, request, forget)
            costs, seconds = federation.costs, time.monotonic() - started
            after = self._scorer.now(forget) if gate else {}
            verdict = gate.verdict(after) if gate else {}
        figures = {"strategy": config.strategy, "seconds": seconds, "costs": costs, "stored_bytes": stored_bytes}
        figures["before"] = own(before, request.clients)
        return Attempt(strategy, figures | result, verdict, after)

    def _estimates_batch_norm(self, request: Request) -> bool:
        """Estimate BatchNorm statistics of the model before a request, and say whether any can be.

        Most clients may have images so unlike the server's that it refuses their statistics. Training goes on with
        averages of running statistics then, and so do requests.
        """
        try:
            self._federation.recalibrate_batch_norm()
        except DestroyedError as error:
            log.warning("── request %s: no BatchNorm statistics, averages in their place: %s", request.id, error)
            return False
        return True

    def _undone(self, request: Request, error: Exception) -> Request:
        """Say what becomes of a request that could not be applied: it is tried again, or set aside.

        Raises:
            Exception: the error itself, where it is a bug, or of this machine.
        """
        if isinstance(error, DestroyedError):
            return self._not_taken(request, {"passed": False, "reason": str(error)})
        if isinstance(error, NotNowError):
            return self._failed(request, str(error))
        if "how" not in request.detail or isinstance(error, OSError):  # a disk that fails is no strategy's fault
            raise error
        strategy = self._config_of(request).strategy
        log.exception("── strategy=%s of request %s failed", strategy, request.id)
        reason = printable(f"strategy={strategy} failed with {type(error).__name__}: {error}")
        return self._not_taken(request, {"passed": False, "reason": reason})

    def _commit(self, request: Request, meant: set[int], attempt: Attempt) -> Request:
        """Commit the model together with the request, and tell the strategies."""
        federation = self._federation
        receipt = {"round": federation.round, "completes_at": self._completes_at(), **attempt.figures}
        if along := sorted(meant.difference(request.clients)):
            receipt["along"] = along
            log.info("── request %s: what was set aside before of the same images is forgotten too", request.id)
        receipt |= {"gate": attempt.verdict} if attempt.verdict else {}
        applied = self._run.commit(federation.state.tensors(), federation.round, request, **receipt)
        assert applied is not None
        federation.split()
        for strategy in {self._strategy, attempt.strategy}:
            strategy.after_request(self._run)
        self._scores = attempt.after
        return applied

    def _unlearn(self, strategy: Strategy, request: Request, forget: ForgetSet) -> dict[str, Any]:
        """Let the strategy forget, if there is anything to forget, and prune; returns what it says for the receipt."""
        federation = self._federation
        result = strategy.forget(federation, forget) if federation.round and forget.clients else {}
        check_result(strategy, result)
        federation.recalibrate_batch_norm()
        gone = [c for c in request.clients if c not in request.portions] + federation.emptied(request.clients)
        if self._run.config.model.client_head and gone:
            log.info("── pruning the output of %s", self._run.named(gone))
        if request.classes:
            log.info("── pruning the output of class %s", listed(sorted(request.classes)))
        federation.state = server_state.after_request(federation.state, gone, request.classes)
        return result

    def _failed(self, request: Request, reason: str) -> Request:
        attempts = request.detail.get("attempts", 0) + 1
        last = attempts >= self._settings.attempts
        fate = f"set aside, {_out(request)}" if last else "tried again at the next boundary"
        log.warning("── request %s, attempt %d: %s; %s", request.id, attempts, reason, fate)
        state = State.QUARANTINED if last else State.COLLECTING
        return self._ledger.advance(request, state, attempts=attempts, reason=reason)

    def _not_taken(self, request: Request, verdict: dict[str, Any]) -> Request:
        """Set a request aside whose model did not pass the gate."""
        here = of_run(self._run.folder)
        log.warning(
            "── request %s is set aside: %s; the model stays as it was, %s. Figures: %s. "
            "To make it again and take it: %s",
            request.id, verdict["reason"], _out(request), as_command("requests", request.id, "--json", *here),
            as_command("forget", f"--accept={request.id}", "--by=NAME", *here),
        )  # fmt: skip
        return self._ledger.advance(request, State.QUARANTINED, reason=verdict["reason"], gate=verdict)

    def _complete(self, request: Request) -> None:
        at_once = self._scores and self._federation.round == request.detail["round"]
        round_, after = self._federation.round, self._scores if at_once else self._scorer.of_any_model()
        row = {"request": request.id, "clients": request.clients, **request.detail, "after": after}
        self._run.record("forget", completed_round=round_, **row)
        kept = own(after, request.clients)
        request = self._ledger.advance(request, State.COMPLETED, completed_round=round_, after=kept)
        log.info(forgotten(request, self._run.names()))
        self._on_commit(self._federation.round)

    def _completes_at(self) -> int:
        """The round with which a request that is applied now is completed: the run's last one, if it trains any."""
        end = self._federation.round + self._settings.rounds_until_completed
        return end if self._last_round is None else min(end, self._last_round)


def check_result(strategy: Strategy, result: Any) -> None:
    """Raise UserError where a receipt cannot hold what a strategy's `forget` returned."""
    name = type(strategy).__name__
    if not isinstance(result, dict):
        raise UserError(f"{name}.forget returned {type(result).__name__}, not a dict for the receipt")
    if taken := sorted(result.keys() & (RECEIPT | PARAMETERS)):
        raise UserError(f"{name}.forget returned {taken[0]!r}, which a receipt says by itself")
    try:
        json.dumps(result)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}.forget returned what a receipt cannot hold: {error}") from None


def _out(request: Request) -> str:
    return f"its {'images' if request.portions else 'clients'} stay out of training"


def own(scores: Scores, clients: Iterable[int]) -> Scores:
    """Give the scores without those of single clients other than these: a receipt says nothing about others."""
    each = {client: of for client, of in scores["forgotten"].items() if int(client) in clients}
    return scores | {"retain_clients": {}, "forgotten": each}
