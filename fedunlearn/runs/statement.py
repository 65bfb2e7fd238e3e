"""What a receipt says: an in-toto statement about the model that a forget request led to.

Most of it follows from the events of the request in the run's ledger, which the receipt brings along with the proofs
that they are in the ledger. `told_by` derives it, when a receipt is made and when somebody verifies it.

Source: in-toto attestation framework, Statement v1.
"""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedunlearn.errors import printable
from fedunlearn.naming import name_of
from fedunlearn.runs.budget import MEASURED_BY, Figures, refusal
from fedunlearn.runs.events import Head
from fedunlearn.runs.ledger import FAILED, State
from fedunlearn.runs.uncertainty import Estimate, fraction

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:fedunlearn:receipt:1"
ENDED = (State.COMPLETED, *FAILED, State.CANCELLED)
FOLLOWING = {
    "": (State.RECEIVED,),
    State.RECEIVED: (State.COLLECTING, State.REFUSED, State.CANCELLED, State.QUARANTINED),
    State.COLLECTING: (State.COLLECTING, State.APPLIED, State.REFUSED, State.QUARANTINED),
    State.REFUSED: (State.CANCELLED,),
    State.QUARANTINED: (State.COLLECTING, State.REFUSED),
    State.APPLIED: (State.RECOVERING,),
    State.RECOVERING: (State.COMPLETED,),
}  # which states may follow which
GROUPS = {"retain": "retain clients", "test": "held-out images"}


class Part(BaseModel):
    """A part of a receipt: nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Part):
    """A committed model."""

    round: int = Field(description="rounds of training that are in it")
    checkpoint: str = Field(description="name of its file")
    sha256: str = Field(description="of its file")


class Figure(Part):
    """An accuracy before and after the request, 0..1, each with its standard error."""

    of: str = Field(description="whose images")
    before: float | None
    before_error: float | None
    after: float | None
    after_error: float | None
    measured_by: str = Field(description="whose figure it is")


class Transition(Part):
    """A state of the request, and when it began."""

    state: str
    at: str


class Event(Part):
    """An event of the ledger, and the proof that it is there."""

    number: int = Field(description="in the ledger, from 1")
    at: str
    text: str = Field(description="JSON, as the ledger has it")
    proof: list[str] = Field(description="Merkle path to the head's root, the nearest first (RFC 9162)")


class Kept(Part):
    """What is still there of the clients."""

    what: str
    why: str


NOTHING_REMOVED = Kept(
    what="what there may be of the clients: images, stored updates, figures",
    why="nobody has looked for it yet (`fedunlearn purge`)",
)


class Told(Part):
    """What follows from the events alone."""

    request: str = Field(description="id of the request in its run")
    clients: list[int] = Field(description="who was to be forgotten; a number means somebody to the federation alone")
    portions: dict[str, dict[str, Any]] = Field(
        default={}, description="by number, whose images were meant and which, where not all of a client's were"
    )
    along: list[int] = Field(
        default=[], description="portions of other requests, set aside before, that have some of the same images"
    )
    asked_by: str = Field(description="who asked, as far as that was said")
    right: str = Field(description="by what right, as far as that was said")
    state: str = Field(description="in which the request ended")
    reason: str = Field(description="why it was not done; empty where it was")
    accepted_by: str = Field(description="who took the model although the gate refused it; else empty")
    received_at: str
    due_at: str = Field(description="by when it had to be applied (GDPR, Art. 12(3))")
    applied_at: str | None
    ended_at: str
    states: list[Transition]
    before: Model | None = Field(description="the model that the request found; its file is deleted")
    after: Model | None = Field(description="the model that the request left")
    figures: list[Figure]
    gate: dict[str, Any] | None = Field(description="what the gate found: figures, errors, budget, reason")
    strategy: str | None = Field(description="that forgot the clients")
    how: dict[str, Any] | None = Field(
        description="`strategy` and its settings as the request asked for them; null where they were the run's"
    )
    seconds: float | None = Field(description="that the strategy took")
    deleted: list[str] = Field(description="what was looked for and is gone")
    kept: list[Kept]

    @property
    def is_late(self) -> bool:
        """Whether the request was applied, or ended, after it was due."""
        return instant(self.applied_at or self.ended_at) > instant(self.due_at)


class Later(Part):
    """What was measured after further rounds of training."""

    round: int
    figures: dict[str, float] = Field(description="class accuracy, 0..1, by whose images")


class Receipt(Told):
    """What became of a forget request."""

    run: str
    names: dict[str, str] = Field(default={}, description="of the clients by number, where they have names")
    examples: dict[str, int] = Field(description="training images by client, as its node declared them")
    rounds: int | None = Field(description="in which one of the clients was trained on; null where nobody kept that")
    settings: dict[str, Any] = Field(description="of the run")
    data: str = Field(description="SHA-256 over the fingerprints of all clients' images (`data` in run.json)")
    versions: dict[str, str]
    packages_sha256: str = Field(description="of the names and versions of all installed packages")
    does_not_prove: list[str]
    later: Later | None
    events: list[Event]
    head: Head = Field(description="of the ledger when the receipt was written, signed with the run's key")

    @property
    def who(self) -> str:
        """Name the clients, or the portions of clients, in a sentence, each with its number."""
        there = [client for client in self.clients if self.examples.get(str(client), 1)]
        found = ", ".join(map(self.called, there or self.clients))
        return found if self.portions else f"client{'s' if len(self.clients) > 1 else ''} {found}"

    def called(self, client: int) -> str:
        """Give a client's name and number, or its number alone."""
        name = self.names.get(str(client))
        if str(client) in self.portions:
            return f"{printable(name or 'a portion')} (number {client})"
        return str(client) if name is None else f"{name_of(0, [name])} (number {client})"

    def shown(self, group: str) -> str:
        """Give what a figure is of, as `client 3`, with that client's name."""
        kind, _, number = group.partition(" ")
        if kind != "client" or not number.isdecimal():
            return group
        return self.called(int(number)) if number in self.portions else f"client {self.called(int(number))}"


class Digest(Part):
    """The digest of a file."""

    sha256: str


class Subject(Part):
    """The model that the receipt is about."""

    name: str
    digest: Digest


class Statement(BaseModel):
    """An in-toto statement whose predicate is a receipt."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type", default=STATEMENT_TYPE)
    subject: list[Subject]
    predicate_type: Literal["urn:fedunlearn:receipt:1"] = Field(alias="predicateType", default=PREDICATE_TYPE)
    predicate: Receipt


def instant(text: str) -> datetime:
    """Read a time.

    Raises:
        ValueError: it is none, or does not say of which zone.
    """
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text} has no time zone")
    return found


def concerns(event: dict[str, Any], request: str) -> bool:
    """Say whether an event is one of a request's steps."""
    return request in (event.get("request"), event.get("purged"))


def brought(events: Sequence[dict[str, Any]], request: str) -> list[int]:
    """Give the numbers of the events that a request's receipt brings along, of all that its ledger has.

    These are its steps, the commit that it found and the one that applied it.

    Args:
        events: the content of each, from the first.
        request: id of the request.
    """
    steps = [number for number, event in enumerate(events, 1) if concerns(event, request)]
    applied = [number for number in steps if events[number - 1].get("state") == State.APPLIED]
    commits = [number for number, event in enumerate(events, 1) if "checkpoint" in event]
    found = [number for number in commits if number < applied[-1]][-2:] if applied else []
    return sorted({*steps, *found})


def told_by(events: Iterable[tuple[int, str, dict[str, Any]]]) -> Told:
    """Derive what a receipt says from the events of its request and from the two commits, in their order.

    Args:
        events: number, time and content of each: the commit before the request was applied and the one that applied it,
            where there are any, and all steps of the request.

    Raises:
        ValueError: they do not make a request that has ended.
    """
    commits: list[Model] = []
    steps: list[tuple[str, dict[str, Any]]] = []
    states, previous = [""], ("", 0)
    purges: list[dict[str, Any]] = []
    for number, at, event in events:
        if "purged" in event:
            purges.append(event)
        elif "request" in event:
            steps.append((at, event))
            states.append(event["state"])
            if states[-1] == State.APPLIED and previous != ("commit", number - 1):
                raise ValueError("the model that was applied is not the one that was committed with it")
        else:
            commits.append(Model(round=event["round"], checkpoint=event["checkpoint"], sha256=event["sha256"]))
        previous = ("commit" if "checkpoint" in event else "", number)
    about = {event["request"] for _, event in steps} | {event["purged"] for event in purges}
    if len(about) != 1 or states[-1] not in ENDED:
        raise ValueError("the events are not those of one request that has ended")
    if wrong := [pair for pair in pairwise(states) if pair[1] not in FOLLOWING.get(pair[0], ())]:
        raise ValueError(f"no request goes from {wrong[0][0] or 'nothing'} to {wrong[0][1]}")
    detail = {name: value for _, event in steps for name, value in event.items()}
    is_applied = detail["state"] == State.COMPLETED
    (received_at, first), (ended_at, last) = steps[0], steps[-1]
    applied = [at for at, event in steps if event["state"] == State.APPLIED]
    return Told(
        request=first["request"],
        clients=first["clients"],
        portions=first.get("portions", {}),
        along=detail.get("along", []) if is_applied else [],
        asked_by=first.get("asked_by", ""),
        right=first.get("right", ""),
        state=last["state"],
        reason="" if is_applied else detail.get("reason", ""),
        accepted_by=detail.get("accepted_by", ""),
        received_at=received_at,
        due_at=first["due_at"],
        applied_at=applied[-1] if is_applied else None,
        ended_at=ended_at,
        states=[Transition(state=event["state"], at=at) for at, event in steps],
        before=commits[0] if is_applied else None,
        after=commits[-1] if is_applied else None,
        figures=_figures(first["clients"], detail) if is_applied else [],
        gate=finite(detail["gate"]) if "gate" in detail else None,
        strategy=detail["strategy"] if is_applied else None,
        how=finite(first.get("how")),
        seconds=detail["seconds"] if is_applied else None,
        deleted=[line for event in purges for line in event["deleted"]],
        kept=[Kept(**one) for one in purges[-1]["kept"]] if purges else [NOTHING_REMOVED],
    )


def gate_reason(gate: dict[str, Any]) -> str:
    """Compute anew from its figures why the gate refuses a model; nothing where it does not."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    def estimate(value: float | None, error: float | None) -> Estimate:
        return Estimate(number(value), number(error))

    def figures(place: int) -> Figures:
        there = [name for name in MEASURED_BY if name in gate]
        return Figures(**{name: estimate(gate[name][place], gate["errors"][name][place]) for name in there})

    about = {name: number(gate[name]) for name in ("retrained", "budget", "loss", "most_loss")}
    return refusal(figures(0), figures(1), test_fall=estimate(*gate["test_fall"]), **about)


def finite(value: Any) -> Any:
    """Give the same with null where a number is not finite: JSON has no word for that."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(clients: list[int], detail: dict[str, Any]) -> list[Figure]:
    """Accuracies of the forget clients' images where an auditor measured them, and of the others."""
    before, after = detail["before"], detail["after"]
    rows = [(GROUPS[key], before[key], after[key], MEASURED_BY[key]) for key in GROUPS]
    for client in map(str, clients):
        if client in before["forgotten"] and client in after["forgotten"]:
            rows.append((f"client {client}", before["forgotten"][client], after["forgotten"][client], "an auditor"))
    return [Figure(of=of, measured_by=by, **_pair("before", old), **_pair("after", new)) for of, old, new, by in rows]


def _pair(name: str, scores: dict[str, Any]) -> dict[str, float | None]:
    estimate = fraction(scores["class"], scores["examples"])
    return finite({name: estimate.value, f"{name}_error": estimate.error})


def content(event: Event) -> dict[str, Any]:
    """Give what an event says.

    Raises:
        ValueError: it is no JSON object.
    """
    found = json.loads(event.text)
    if not isinstance(found, dict):
        raise ValueError(f"event {event.number} is no object")
    return found
