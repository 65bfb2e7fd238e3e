"""The ledger of one run: requests, their states and the current checkpoint, as they follow from signed events.

A transaction of the ledger is the only commit point of a run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

from dateutil.relativedelta import relativedelta

from fedunlearn.data.selection import Portion, Selection
from fedunlearn.errors import UserError
from fedunlearn.naming import name_of
from fedunlearn.runs.events import EventLog, now
from fedunlearn.runs.hints import forget_command
from fedunlearn.schema import check_text


class State(StrEnum):
    """Where a request stands."""

    RECEIVED = "RECEIVED"
    COLLECTING = "COLLECTING"  # the strategy is at work; from here on its clients do not train
    APPLIED = "APPLIED"  # the unlearned model is the current checkpoint
    RECOVERING = "RECOVERING"  # the retain clients train on for the rounds that were asked for
    COMPLETED = "COMPLETED"
    REFUSED = "REFUSED"
    QUARANTINED = "QUARANTINED"  # could not be applied, or its model not be taken; its clients stay out of training
    CANCELLED = "CANCELLED"  # taken back by whoever asked, before it was taken up or after it was refused


OPEN = (State.RECEIVED, State.COLLECTING, State.APPLIED, State.RECOVERING)
FAILED = (State.REFUSED, State.QUARANTINED)
VOID = (*FAILED, State.CANCELLED)
NOT_VOID = tuple(state for state in State if state not in VOID)
COUNTED = (*NOT_VOID, State.QUARANTINED)  # where the portions of a request are apart from their clients, or will be
TAKEN_UP = tuple(state for state in State if state not in (State.RECEIVED, State.REFUSED, State.CANCELLED))
RECEIPT = {
    "about", "about_written", "accepted_at", "accepted_by", "after", "all_clients", "along", "asked_again", "asked_by",
    "attempts", "before", "cancelled", "checkpoint", "clients", "completed_round", "completes_at", "costs",
    "counts_on", "deleted", "due_at", "examples", "finished", "gate", "how", "kept", "key", "kind", "ledger",
    "not_before", "portions", "purged", "readmitted", "reason", "receipt", "request", "right", "round", "seconds",
    "signed", "state", "stored_bytes", "strategy", "turned_away", "unwitnessed",
}  # fmt: skip  # what a receipt, its row of metrics, or another event of the ledger says by itself
FORGOTTEN = (State.APPLIED, State.RECOVERING, State.COMPLETED)


@dataclass(frozen=True)
class Request:
    """One forget request; `detail` is its receipt as far as it is known.

    Where not all of a client's images are meant, `clients` has the number of that portion (`data.selection.Portion`).
    """

    id: str
    clients: list[int]
    state: State
    received_at: str
    detail: dict[str, Any]

    @property
    def can_be_cancelled(self) -> bool:
        """Say whether it may be taken back: nothing has been done about it."""
        return self.state in (State.RECEIVED, State.REFUSED)

    @property
    def portions(self) -> dict[int, Portion]:
        """Give the portions of clients that are meant, by number."""
        return {
            int(number): Portion.read(int(number), about) for number, about in self.detail.get("portions", {}).items()
        }

    @property
    def counts_on(self) -> list[str]:
        """Give the ids of earlier requests that cover some of what was asked for, which is not asked for again."""
        return list(self.detail.get("counts_on", []))

    @property
    def along(self) -> list[int]:
        """Give the portions that were forgotten along with it, as others had set aside images that it means."""
        return list(self.detail.get("along", []))

    @property
    def covered(self) -> set[int]:
        """Give the clients and portions that it is about, and those that went along."""
        return {*self.clients, *self.along}

    @property
    def owners(self) -> list[int]:
        """Give the clients whose images are meant, all of them or some."""
        portions = self.portions
        return sorted(portions[number].client if number in portions else number for number in self.clients)

    @property
    def meant(self) -> dict[int, tuple[int, Selection | None]]:
        """Give whose images are meant and which of them (None: all), by the number that they have in the run."""
        portions = self.portions
        return {n: (portions[n].client, portions[n].selection) if n in portions else (n, None) for n in self.clients}

    def may_share(self, portion: Portion) -> bool:
        """Say whether some of the images that are meant may be among a portion's."""
        means = [selection for owner, selection in self.meant.values() if owner == portion.client]
        return any(selection is None or selection.may_share(portion.selection) for selection in means)

    @property
    def selection(self) -> Selection | None:
        """Give which of the clients' images are meant; None for all."""
        return next((portion.selection for portion in self.portions.values()), None)

    @property
    def classes(self) -> set[int]:
        """Give the classes that leave whole: all images that anybody has of them are meant."""
        selection = self.selection if self.detail.get("all_clients") else None
        return set(selection.classes) if selection and selection.is_of_classes else set()


@dataclass(frozen=True)
class Current:
    """The last committed model: after `round` rounds, in the file `checkpoint` of this SHA-256."""

    round: int
    checkpoint: str
    sha256: str
    finished: bool


@dataclass
class Standing:
    """What follows from the events, one after the other.

    Attributes:
        requests: by id, in order of arrival.
        current: the last commit.
        examples: by client.
        nonces: of signed requests.
        wanted: ids of requests that somebody has asked for again with a signature.
        purged: by request after which what was left of its clients was removed, how many receipts it had then.
        receipts: by request, the state and the round that each says something about.
        about: SHA-256 of `run.json`; before it that of an earlier one, as long as it may still be there.
        unwitnessed: how many events there were where no head was kept outside any more.
    """

    requests: dict[str, Request] = field(default_factory=dict)
    current: Current | None = None
    examples: dict[int, int] = field(default_factory=dict)
    receipts: dict[str, list[tuple[str, int | None]]] = field(default_factory=dict)
    about: list[str] = field(default_factory=list)
    unwitnessed: list[int] = field(default_factory=list)
    nonces: set[str] = field(default_factory=set)
    wanted: set[str] = field(default_factory=set)
    purged: dict[str, int] = field(default_factory=dict)

    def follow(self, at: str, event: dict[str, Any]) -> None:
        """Take one event in."""
        for name in ("signed", "cancelled"):
            if name in event:
                self.nonces.add(event[name]["nonce"])
        match event:
            case {"request": id_, "state": State.RECEIVED, "clients": clients, **detail}:
                self.requests[id_] = Request(id_, clients, State.RECEIVED, at, detail)
            case {"request": id_, "state": state, **detail}:
                before = self.requests[id_]
                self.requests[id_] = replace(before, state=State(state), detail=before.detail | detail)
            case {"round": round_, "checkpoint": checkpoint, "sha256": sha256}:
                self.current = Current(round_, checkpoint, sha256, finished=False)
            case {"finished": finished} if self.current:
                self.current = replace(self.current, finished=finished)
            case {"examples": examples}:
                self.examples |= {int(client): count for client, count in examples.items()}
            case {"receipt": _, "of": id_, "ended": state, "as_of": round_}:
                self.receipts.setdefault(id_, []).append((state, round_))
            case {"asked_again": _, "counts_on": ids}:
                self.wanted.update(ids)
            case {"about": sha256}:
                self.about.append(sha256)
            case {"about_written": _}:
                del self.about[:-1]
            case {"purged": id_}:
                self.purged[id_] = len(self.receipts.get(id_, []))
            case {"unwitnessed": number}:
                self.unwitnessed.append(number)


class Ledger(EventLog[Standing]):
    """Opens (and makes) the ledger at `path`; several processes may have it open.

    The events are all there is: requests, the current checkpoint and the clients' examples follow from them.

    Raises:
        UserError: from every method, where the file is damaged, locked for too long, on a full disk, or not as the
            run's processes wrote it (`TamperedError`).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, Standing)
        self.names: Callable[[], Sequence[str]] = list  # of clients, which the run knows

    def file(
        self,
        clients: Iterable[int],
        *,
        not_before: int = 0,
        months: int = 1,
        by: str = "",
        right: str = "",
        signed: Mapping[str, Any] | None = None,
        how: Mapping[str, Any] | None = None,
        selection: Selection | None = None,
        all_clients: bool = False,
        first_portion: int = 0,
    ) -> list[Request]:
        """Ask for `clients` to be forgotten together, after round `not_before` at the earliest.

        Args:
            months: in which the request has to be applied.
            by: who asks.
            right: by what right.
            signed: what the clients' key has signed.
            how: settings of the run that are others for this request: `strategy` and `unlearn`.
            selection: which of the clients' images are meant; all by default.
            all_clients: whether `clients` are all that there are.
            first_portion: the number of clients that the run has: portions of clients are numbered from there on.

        Raises:
            UserError: what was signed was filed before, `how` comes too late for an earlier request, or `by` or
                `right` is no text.

        Returns the earlier requests that cover some of them (those that are void do not), then a new one for the rest.
        """
        check_text(by)
        check_text(right)
        with self.transaction():
            self._check_unused(signed)
            self.check_how(clients, how, selection)
            numbers, unused = self.numbered(clients, selection), count(first_portion + len(self.portions()))
            wanted = [next(unused) if number is None else number for number in numbers.values()]
            earlier = self._touching(wanted)
            rest = [c for c in wanted if not any(c in r.covered for r in earlier)]
            if not rest:
                if signed:
                    self.record(asked_again=wanted, signed=dict(signed), counts_on=[request.id for request in earlier])
                return earlier
            not_before = max(
                [not_before, *(r.detail["not_before"] for r in self.requests() if r.state == State.RECEIVED)]
            )
            at, id_ = self.time(), f"r{len(self.requests()) + 1}"
            about = {"not_before": not_before, "due_at": due(at, months), "asked_by": by, "right": right}
            about |= {"signed": dict(signed)} if signed else {}
            about |= {"how": dict(how)} if how else {}
            if selection:
                owners = dict(zip(wanted, numbers, strict=True))
                about |= {"portions": {str(c): Portion(c, owners[c], selection).content() for c in rest}}
            about |= {"all_clients": True} if all_clients else {}
            about |= {"counts_on": [request.id for request in earlier]} if earlier else {}
            self.record(at, request=id_, state=State.RECEIVED, clients=rest, **about)
            return [*earlier, self.request(id_)]

    def numbered(self, clients: Iterable[int], selection: Selection | None) -> dict[int, int | None]:
        """Give each client's own number, or that of the portion it was asked for before; None for a new portion.

        A client that has asked to leave whole has its own number, and the same portion again that of the earlier one:
        also of one that was set aside, whose images are out of training already.

        Args:
            clients: their numbers.
            selection: which of their images are meant; all by default, under the client's number.
        """
        owners = sorted(set(clients))
        if not selection:
            return {owner: owner for owner in owners}
        known = {(portion.client, portion.selection): portion.number for portion in self.portions(COUNTED).values()}
        return {owner: owner if self._touching([owner]) else known.get((owner, selection)) for owner in owners}

    def portions(self, states: Iterable[State] = tuple(State)) -> dict[int, Portion]:
        """Give the portions of clients that requests in some states are about, or took along, by number."""
        known = {n: portion for request in self.requests() for n, portion in request.portions.items()}
        return {n: known[n] for n in self.clients_in(states) if n in known}

    def classes_left(self) -> set[int]:
        """Give the classes that have left whole."""
        return {k for request in self.requests() if request.state in FORGOTTEN for k in request.classes}

    def requests(self) -> list[Request]:
        """All requests, in order of arrival."""
        return list(self.found().requests.values())

    def covering(self, clients: Iterable[int], selection: Selection | None = None) -> list[Request]:
        """Give the earlier requests, if any, that cover all of the clients together; void ones do not.

        Args:
            clients: their numbers.
            selection: which of their images are meant; all by default.
        """
        wanted = set(self.numbered(clients, selection).values())
        found = self._touching(number for number in wanted if number is not None)
        return found if wanted <= {client for request in found for client in request.covered} else []

    def check_how(
        self, clients: Iterable[int], how: Mapping[str, Any] | None, selection: Selection | None = None
    ) -> None:
        """Raise UserError where settings come too late for an earlier request of one of the clients."""
        wanted = self.numbered(clients, selection).values()
        if how and (earlier := self._touching(number for number in wanted if number is not None)):
            raise UserError(f"request {earlier[0].id} is {earlier[0].state}: its settings stay as they are")

    def overdue(self) -> list[Request]:
        """Give the requests that are not applied yet, and whose time is over."""
        waiting = (State.RECEIVED, State.COLLECTING)
        return [r for r in self.requests() if r.state in waiting and r.detail["due_at"] < now()]

    def unmet(self) -> list[Request]:
        """Give the requests that failed, and whose clients no other request covers, nor has left whole since."""
        requests, gone = self.requests(), set(self.clients_in(FORGOTTEN))
        empty = {number for number, examples in self.examples().items() if not examples}
        asked = {meant for request in requests if request.state not in VOID for meant in request.meant.values()}
        asked |= {m for request in requests for n, m in request.meant.items() if not gone.isdisjoint({n, m[0]})}
        asked |= {m for request in requests for n, m in request.meant.items() if n in request.portions.keys() & empty}
        return [r for r in requests if r.state in FAILED and not asked.issuperset(r.meant.values())]

    def _touching(self, clients: Iterable[int]) -> list[Request]:
        """The requests that cover some of the clients; void ones do not."""
        wanted = set(clients)
        return [r for r in self.requests() if r.state not in VOID and wanted & r.covered]

    def request(self, request_id: str) -> Request:
        """Read the request of that id.

        Raises:
            UserError: there is none; with those that there are.
        """
        requests = self.requests()
        for request in requests:
            if request.id == request_id:
                return request
        known = ", ".join(request.id for request in requests) or "none"
        raise UserError(f"there is no request {request_id}: there are {known}")

    def clients_in(self, states: Iterable[State]) -> list[int]:
        """The clients of all requests in one of `states`, sorted."""
        wanted = set(states)
        return sorted({client for r in self.requests() if r.state in wanted for client in r.covered})

    def applied(self) -> int:
        """Count the requests that have been applied."""
        return sum(request.state in FORGOTTEN for request in self.requests())

    def advance(self, request: Request, state: State, **detail: Any) -> Request:
        """Move a request to `state`, adding `detail` to its receipt; one that was cancelled meanwhile stays so."""
        with self.transaction():
            if self.request(request.id).state != State.CANCELLED:
                self._advance(request, state, detail)
        return self.request(request.id)

    def cancel(self, request_id: str, *, signed: Mapping[str, Any] | None = None) -> Request:
        """Take a request back.

        Args:
            request_id: of the request.
            signed: what its clients' key has signed.

        Raises:
            UserError: there is none of that id, it was taken up already, or a later request counts on it.
        """
        with self.transaction():
            self._check_unused(signed)
            request = self.request(request_id)
            if not request.can_be_cancelled and request.state != State.CANCELLED:
                raise UserError(
                    f"request {request_id} is {request.state}: only a RECEIVED or a REFUSED one can be taken back"
                )
            if request.state == State.RECEIVED:
                self._check_unwanted(request_id, is_signed=bool(signed))
            if signed or request.state != State.CANCELLED:
                self._advance(request, State.CANCELLED, {"cancelled": dict(signed)} if signed else {})
        return self.request(request_id)

    def _check_unwanted(self, request_id: str, *, is_signed: bool) -> None:
        """Raise UserError where somebody else counts on a request."""
        if later := [r.id for r in self.requests() if r.state not in VOID and request_id in r.counts_on]:
            raise UserError(f"request {request_id} cannot be taken back before {later[-1]}, which counts on it")
        if request_id in self.found().wanted and not is_signed:
            raise UserError(f"request {request_id} was asked for with a signature too: who signed may take it back")

    def accept(self, request_id: str, by: str) -> Request:
        """Have an `acceptable` request applied once more, and its model taken whatever the gate says, if it is finite.

        Args:
            by: who answers for that.
        """
        check_text(by)
        with self.transaction():
            about = {"accepted_by": by, "accepted_at": now(), "attempts": 0}
            self._advance(self.acceptable(request_id), State.COLLECTING, about)
        return self.request(request_id)

    def acceptable(self, request_id: str) -> Request:
        """Give a request that somebody may `accept`; raise UserError where it is none."""
        request = self.request(request_id)
        if later := self.covering(request.clients):
            raise UserError(f"request {request_id} is not needed any more: {later[0].id} is {later[0].state}")
        if request.state != State.QUARANTINED or "gate" not in request.detail:
            raise UserError(f"request {request_id} is {request.state}: the gate has set nothing aside to be accepted")
        self._check_apart(request)
        return request

    def commit(
        self, round_: int, checkpoint: str, sha256: str, *, request: Request | None = None, **detail: Any
    ) -> Request | None:
        """Make `checkpoint` the current model; with `request`, move that to APPLIED in the same transaction."""
        with self.transaction():
            self.record(round=round_, checkpoint=checkpoint, sha256=sha256)
            if request is not None:
                self._advance(request, State.APPLIED, detail)
        return None if request is None else self.request(request.id)

    def current(self) -> Current | None:
        """The last commit, or None before the first."""
        return self.found().current

    def finish(self) -> bool:
        """Mark the run as finished, unless a request is open; returns whether it is.

        A request that is filed later finds the mark, and knows that this process will not look again.
        """
        with self.transaction():
            if any(request.state in OPEN for request in self.requests()):
                return False
            self.record(finished=True)
            return True

    def reopen(self) -> None:
        """Take back the mark of `finish`: this process will look at requests again."""
        with self.transaction():
            if (current := self.current()) and current.finished:
                self.record(finished=False)

    def examples(self) -> dict[int, int]:
        """Give how many examples each client has, as its node said when it was there first."""
        return dict(self.found().examples)

    def keep_examples(self, examples: Mapping[int, int]) -> None:
        """Keep the examples of clients that were not there before."""
        with self.transaction():
            known = self.found().examples
            if new := {str(client): count for client, count in examples.items() if client not in known}:
                self.record(examples=new)

    def keep_about(self, sha256: str) -> None:
        """Keep the SHA-256 of the run's `run.json`, before that is written."""
        with self.transaction():
            if self.found().about[-1:] != [sha256]:
                self.record(about=sha256)

    def about_written(self) -> None:
        """Keep that `run.json` has been written."""
        with self.transaction():
            self.record(about_written=True)

    def unwitnessed(self) -> list[int]:
        """Give how many events there were where somebody had removed the head that is kept outside."""
        return list(self.found().unwitnessed)

    def about(self) -> list[str]:
        """Give the SHA-256 of `run.json`; before it that of an earlier one, as long as it may still be there."""
        return list(self.found().about)

    def nonces(self) -> set[str]:
        """Give the numbers that signed requests have used."""
        return set(self.found().nonces)

    def _check_unused(self, signed: Mapping[str, Any] | None) -> None:
        if signed and signed["nonce"] in self.found().nonces:
            raise UserError("what was signed was filed before")

    def _check_apart(self, request: Request) -> None:
        """Raise UserError where other requests cover some of a request's clients: they would be forgotten twice."""
        if not (others := self._touching(request.clients)):
            return
        covered = {client for other in others for client in other.covered}
        names, rest = self.names(), [client for client in request.clients if client not in covered]
        states = ", ".join(f"{other.id} for {_listed(other.clients, names)} is {other.state}" for other in others)
        way_on = f"; `{forget_command(rest, names, self.folder)}` asks for the rest"
        way_on = "" if request.portions else way_on
        about = f"request {request.id} for {_listed(request.clients, names)}"
        raise UserError(f"{about} cannot be accepted any more: {states}{way_on}")

    def write_down(self, clients: Iterable[int], action: str, reason: str) -> None:
        """Write down that somebody asked for something and may not."""
        with self.transaction():
            self.record(turned_away=sorted(clients), action=action, reason=reason)

    def keep_receipt(self, request: Request, file: str, sha256: str, *, round_: int | None) -> None:
        """Keep the SHA-256 of a request's receipt, and the round of which it says something later."""
        with self.transaction():
            self.record(receipt=file, of=request.id, ended=request.state, as_of=round_, sha256=sha256)

    def keep_purge(self, request: Request, *, deleted: Sequence[str], kept: Sequence[Mapping[str, str]]) -> None:
        """Keep what was removed of a request's clients, and what is left, each as `what` and `why`."""
        with self.transaction():
            self.record(purged=request.id, deleted=list(deleted), kept=list(kept))

    def purged(self) -> list[Request]:
        """Give the requests after which what was left of their clients was removed."""
        return [request for request in self.requests() if request.id in self.found().purged]

    def purged_clients(self) -> set[int]:
        """Give the clients whose images were removed; of a portion of a client's none is."""
        return {c for request in self.purged() for c in request.clients if c not in request.portions}

    def is_told(self, request: Request) -> bool:
        """Say whether the last receipt of a request that has ended is about how it stands now."""
        about = self.receipts(request.id)
        return bool(about) and about[-1][0] == request.state and self.found().purged.get(request.id) != len(about)

    def readmit(self, clients: Mapping[int, str]) -> None:
        """Keep that clients train here although another run has forgotten them: by client, which one."""
        with self.transaction():
            self.record(readmitted={str(client): where for client, where in clients.items()})

    def receipts(self, request_id: str) -> list[tuple[str, int | None]]:
        """Give of each receipt of a request the state that it is about, and the round, if it is a later one."""
        return list(self.found().receipts.get(request_id, []))

    def _advance(self, request: Request, state: State, detail: dict[str, Any]) -> None:
        self.record(request=request.id, state=state, **detail)


def _listed(clients: Sequence[int], names: Sequence[str]) -> str:
    return f"client{'s' if len(clients) > 1 else ''} {', '.join(name_of(client, names) for client in clients)}"


def due(received_at: str, months: int) -> str:
    """Say by when a request has to be applied: so many calendar months later.

    Example:
        >>> due("2026-01-31T12:00:00+00:00", 1)
        '2026-02-28T12:00:00+00:00'
    """
    return (datetime.fromisoformat(received_at) + relativedelta(months=months)).isoformat()
