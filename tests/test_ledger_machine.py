"""The ledger beside a model of it in plain Python: whatever is asked in whatever order, both say the same."""

import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedunlearn.errors import UserError
from fedunlearn.runs.events import TamperedError
from fedunlearn.runs.ledger import FAILED, FORGOTTEN, OPEN, VOID, Ledger, State

NEXT = {
    State.RECEIVED: (State.COLLECTING, State.REFUSED),
    State.COLLECTING: (State.COLLECTING, State.QUARANTINED),
    State.APPLIED: (State.RECOVERING,),
    State.RECOVERING: (State.COMPLETED,),
}
CLIENTS = st.sets(st.integers(0, 4), min_size=1, max_size=3)
PLACES = st.integers(0, 50)
TAMPERINGS = (
    "UPDATE events SET event = replace(event, '\"', ' \"') WHERE number = :number",
    "UPDATE events SET at = '2001-01-01T00:00:00.000+00:00' WHERE number = :number",
    "DELETE FROM events WHERE number = :number",
    "DELETE FROM events WHERE number >= :number",
    "UPDATE events SET number = 1000 WHERE number = :number",
)


@dataclass(eq=False)
class Asked:
    """What the model knows of a request."""

    clients: list[int]
    state: State = State.RECEIVED
    gated: bool = False
    beside: list["Asked"] = field(default_factory=list)  # earlier ones that cover some of what was asked for


@dataclass
class Model:
    """What a ledger should say."""

    requests: list[Asked] = field(default_factory=list)
    round: int = 0
    finished: bool = False

    def valid(self):
        return [asked for asked in self.requests if asked.state not in VOID]

    def touching(self, clients):
        return [asked for asked in self.valid() if set(asked.clients) & set(clients)]

    def covering(self, clients):
        covered = {client for asked in self.valid() for client in asked.clients}
        return [asked for asked in self.valid() if set(asked.clients) & set(clients)] if set(clients) <= covered else []


class LedgerMachine(RuleBasedStateMachine):
    """Every rule does something to the ledger and to the model."""

    def __init__(self):
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        self.path = self.home / "runs" / "run" / "ledger.sqlite"
        self.model = Model()

    @initialize()
    def begin(self):
        self.ledger = Ledger(self.path)
        self.ledger.commit(0, "round-0", "0")

    def teardown(self):
        self.ledger.close()
        shutil.rmtree(self.home)

    def chosen(self, place):
        """One of the requests, in the ledger and in the model."""
        place %= len(self.model.requests)
        return self.ledger.requests()[place], self.model.requests[place]

    @rule(clients=CLIENTS)
    def submit(self, clients):
        earlier = [asked for asked in self.model.valid() if set(asked.clients) & clients]
        rest = sorted(clients - {client for asked in earlier for client in asked.clients})
        self.model.requests += [Asked(rest, beside=earlier)] if rest else []
        expected = [*earlier, *self.model.requests[-1:]] if rest else earlier
        assert [request.clients for request in self.ledger.file(clients)] == [asked.clients for asked in expected]

    @precondition(lambda self: self.model.requests)
    @rule(place=PLACES)
    def cancel(self, place):
        request, asked = self.chosen(place)
        counted_on = [one for later in self.model.valid() for one in later.beside]
        if asked.state == State.RECEIVED and asked in counted_on:
            with pytest.raises(UserError, match="which counts on it"):
                self.ledger.cancel(request.id)
        elif asked.state in (State.RECEIVED, State.REFUSED, State.CANCELLED):
            asked.state = self.ledger.cancel(request.id).state
            assert asked.state == State.CANCELLED
        else:
            with pytest.raises(UserError, match="only a RECEIVED or a REFUSED one"):
                self.ledger.cancel(request.id)

    @precondition(lambda self: any(asked.state in NEXT for asked in self.model.requests))
    @rule(place=PLACES, way=st.integers(0, 1), gated=st.booleans())
    def advance(self, place, way, gated):
        open_ = [asked for asked in self.model.requests if asked.state in NEXT]
        request, asked = self.chosen(self.model.requests.index(open_[place % len(open_)]))
        states = NEXT[asked.state]
        asked.state = states[way % len(states)]
        asked.gated |= gated and asked.state == State.QUARANTINED
        detail = {"gate": {"passed": False}} if asked.gated else {}
        assert self.ledger.advance(request, asked.state, **detail).state == asked.state

    @precondition(lambda self: self.model.requests)
    @rule(place=PLACES)
    def advance_what_is_cancelled(self, place):
        request, asked = self.chosen(place)
        if asked.state == State.CANCELLED:
            assert self.ledger.advance(request, State.COLLECTING).state == State.CANCELLED

    @precondition(lambda self: any(asked.state == State.COLLECTING for asked in self.model.requests))
    @rule(place=PLACES)
    def apply(self, place):
        collecting = [asked for asked in self.model.requests if asked.state == State.COLLECTING]
        request, asked = self.chosen(self.model.requests.index(collecting[place % len(collecting)]))
        applied = self.ledger.commit(self.model.round, f"round-{self.model.round}", "1", request=request)
        asked.state, self.model.finished = State.APPLIED, False
        assert applied.state == State.APPLIED

    @precondition(lambda self: self.model.requests)
    @rule(place=PLACES)
    def accept(self, place):
        request, asked = self.chosen(place)
        if asked.state == State.QUARANTINED and asked.gated and not self.model.touching(asked.clients):
            asked.state = self.ledger.accept(request.id, "somebody").state
            assert asked.state == State.COLLECTING
        else:
            with pytest.raises(
                UserError, match=r"not needed any more|has set nothing aside|cannot be accepted any more"
            ):
                self.ledger.accept(request.id, "somebody")

    @rule()
    def train(self):
        self.model.round += 1
        self.model.finished = False
        self.ledger.commit(self.model.round, f"round-{self.model.round}", "1")

    @rule()
    def finish(self):
        is_idle = not any(asked.state in OPEN for asked in self.model.requests)
        self.model.finished |= is_idle
        assert self.ledger.finish() == is_idle

    @rule()
    def reopen(self):
        self.model.finished = False
        self.ledger.reopen()

    @rule()
    def fail_in_the_middle_of_a_transaction(self):
        requests = self.ledger.requests()
        with pytest.raises((TypeError, AttributeError)):
            self.ledger.commit(99, "lost", "2", request=requests[0] if requests else object(), detail=object())

    @rule()
    def restart(self):
        self.ledger.close()
        self.ledger = Ledger(self.path)

    @rule(number=st.integers(1, 100), how=st.sampled_from(TAMPERINGS))
    def tamper_with_a_copy(self, number, how):
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(self.home, folder, dirs_exist_ok=True)
            copy = Path(folder) / self.path.relative_to(self.home)
            db = sqlite3.connect(copy)
            with db:
                db.execute(how, {"number": 1 + number % len(self.ledger.events())})
            db.close()
            ledger = Ledger(copy)
            with pytest.raises(TamperedError):
                ledger.requests()
            ledger.close()

    @invariant()
    def says_the_same(self):
        if not hasattr(self, "ledger"):
            return
        other = Ledger(self.path)
        for ledger in (self.ledger, other):
            model, current = self.model, ledger.current()
            assert [(r.clients, r.state) for r in ledger.requests()] == [(a.clients, a.state) for a in model.requests]
            assert [r.id for r in ledger.requests()] == [f"r{n + 1}" for n in range(len(model.requests))]
            assert (current.round, current.finished) == (model.round, model.finished)
            assert ledger.applied() == sum(asked.state in FORGOTTEN for asked in model.requests)
            failed = [a for a in model.requests if a.state in FAILED and not model.covering(a.clients)]
            assert [request.clients for request in ledger.unmet()] == [asked.clients for asked in failed]
            assert ledger.kept_head() == ledger.signed_head()
        other.close()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(
    max_examples=12, stateful_step_count=14, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
