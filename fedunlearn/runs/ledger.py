"""The ledger of one run: everything that happened, as signed events in SQLite, and what follows from them.

Requests, their states and the current checkpoint follow from the events. A transaction of the ledger
(`synchronous=FULL`) is the only commit point of a run.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from logging import getLogger
from pathlib import Path
from typing import Any

from dateutil.relativedelta import relativedelta

from fedunlearn.errors import UserError
from fedunlearn.runs import keys, merkle
from fedunlearn.runs.files import write_atomically


class State(StrEnum):
    """Where a request stands."""

    RECEIVED = "RECEIVED"
    COLLECTING = "COLLECTING"  # the strategy is at work; from here on its clients do not train
    APPLIED = "APPLIED"  # the unlearned model is the current checkpoint
    RECOVERING = "RECOVERING"  # the retain clients train on for the rounds that were asked for
    COMPLETED = "COMPLETED"
    REFUSED = "REFUSED"
    QUARANTINED = "QUARANTINED"  # could not be applied, or its model not be taken; its clients stay out of training
    CANCELLED = "CANCELLED"  # taken back by whoever asked, before it was taken up


OPEN = (State.RECEIVED, State.COLLECTING, State.APPLIED, State.RECOVERING)
FAILED = (State.REFUSED, State.QUARANTINED)
VOID = (*FAILED, State.CANCELLED)
TAKEN_UP = tuple(state for state in State if state not in (State.RECEIVED, State.REFUSED, State.CANCELLED))
RECEIPT = {
    "about", "about_written", "accepted_at", "accepted_by", "after", "asked_again", "asked_by", "attempts",
    "before", "cancelled", "checkpoint", "clients", "completed_round", "completes_at", "costs", "deleted", "due_at",
    "examples", "finished", "gate", "kept", "key", "kind", "ledger", "not_before", "purged", "readmitted", "reason",
    "receipt", "request", "right", "round", "seconds", "signed", "state", "stored_bytes", "strategy", "turned_away",
    "unwitnessed",
}  # fmt: skip  # what a receipt, its row of metrics, or another event of the ledger says by itself
FORGOTTEN = (State.APPLIED, State.RECOVERING, State.COMPLETED)


@dataclass(frozen=True)
class Request:
    """One forget request; `detail` is its receipt as far as it is known."""

    id: str
    clients: list[int]
    state: State
    received_at: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class Current:
    """The last committed model: after `round` rounds, in the file `checkpoint` of this SHA-256."""

    round: int
    checkpoint: str
    sha256: str
    finished: bool


TRY_SECONDS = 5  # until a lock of another process is spoken of
LOCKED_SECONDS = 60  # until it is given up

log = getLogger("fedunlearn")

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, event TEXT NOT NULL, signature TEXT NOT NULL)
"""
FORMAT = 2
FIRST = 4  # events that a new ledger may have before a head of it is kept
RUNS = "runs"  # folder of a state folder


class TamperedError(UserError):
    """A ledger is not as this run's processes wrote it."""


@dataclass(frozen=True)
class Head:
    """What stands for the first `size` events: their Merkle root, both signed with the run's key.

    Attributes:
        key: id of the run's key.
        size: how many events.
        root: of the tree over them, in hexadecimal digits.
        signature: in hexadecimal digits.
    """

    key: str
    size: int
    root: str
    signature: str = ""

    @property
    def message(self) -> bytes:
        """What is signed."""
        return f"fedunlearn ledger\n{self.key}\n{self.size}\n{self.root}\n".encode()

    @property
    def is_signed(self) -> bool:
        """Whether the signature is the run's."""
        return keys.is_signed(self.signature, self.message, self.key)


@dataclass
class Standing:
    """What follows from the events, one after the other.

    Attributes:
        requests: by id, in order of arrival.
        current: the last commit.
        examples: by client.
        nonces: of signed requests.
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
            case {"about": sha256}:
                self.about.append(sha256)
            case {"about_written": _}:
                del self.about[:-1]
            case {"purged": id_}:
                self.purged[id_] = len(self.receipts.get(id_, []))
            case {"unwitnessed": number}:
                self.unwitnessed.append(number)


class Ledger:
    """Opens (and makes) the ledger at `path`; several processes may have it open.

    Where the file cannot be written, it can be read. The events are all there is: requests, the current checkpoint and
    the clients' examples follow from them. Every event is signed, together with all before it, with the run's key.
    After a transaction the last signature is written outside of the database too, so that a ledger that was cut or put
    back shows. Keys lie in `keys`, signatures in `heads`, of the run's state folder; of another run beside it.

    Raises:
        UserError: from every method, where the file is damaged, locked for too long, on a full disk, or not as the
            run's processes wrote it (`TamperedError`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        folder = path.parent
        in_home = folder.parent.name == RUNS
        self.keys = (folder.parent.parent if in_home else folder) / "keys"
        self._head_file = (folder.parent.parent if in_home else folder) / "heads" / f"{folder.name}.json"
        with self._readable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=TRY_SECONDS, isolation_level=None, check_same_thread=False)
        self._begin_reading()
        self._execute("PRAGMA synchronous=FULL")
        if not path.exists() or os.access(path, os.W_OK):
            self._execute(SCHEMA)
        columns = [row[1] for row in self._rows("PRAGMA table_info(events)")]
        if columns and "signature" not in columns:
            raise UserError(f"{path} was written by an earlier version of fedunlearn: finish the run with that version")

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def copy_to(self, other: "Ledger") -> None:
        """Copy everything into another ledger."""
        other.begin_anew()
        with self._readable():
            self._db.backup(other._db)
        other._begin_reading()
        with other._transaction():
            other._is_witnessed = True
            other._new_key(fork_of=self.head().root)

    def begin_anew(self) -> None:
        """Put the signature of an earlier run of the same name aside: this run begins without events."""
        if not self._rows("SELECT 1 FROM events LIMIT 1") and self._head_file.exists():
            ended = f"{self._head_file.stem}.ended-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
            self._head_file.rename(self._head_file.with_name(ended))

    def file(
        self,
        clients: Iterable[int],
        *,
        not_before: int = 0,
        months: int = 1,
        by: str = "",
        right: str = "",
        signed: Mapping[str, Any] | None = None,
    ) -> list[Request]:
        """Ask for `clients` to be forgotten together, after round `not_before` at the earliest.

        Args:
            months: in which the request has to be applied.
            by: who asks.
            right: by what right.
            signed: what the clients' key has signed.

        Returns the earlier requests that cover some of them (those that are void do not), then a new one for the rest.
        """
        with self._transaction():
            self._check_unused(signed)
            wanted = sorted(set(clients))
            earlier = [r for r in self._valid() if set(r.clients) & set(wanted)]
            rest = [c for c in wanted if not any(c in r.clients for r in earlier)]
            if not rest:
                if signed:
                    self._record(asked_again=wanted, signed=dict(signed))
                return earlier
            number = len(self.requests()) + 1
            at = self._time()
            about = {"not_before": not_before, "due_at": due(at, months), "asked_by": by, "right": right}
            about |= {"signed": dict(signed)} if signed else {}
            self._record(at, request=f"r{number}", state=State.RECEIVED, clients=rest, **about)
            return [*earlier, self.request(f"r{number}")]

    def requests(self) -> list[Request]:
        """All requests, in order of arrival."""
        return list(self._standing().requests.values())

    def covering(self, clients: Iterable[int]) -> list[Request]:
        """Give the earlier requests, if any, that cover all of the clients together; void ones do not."""
        wanted, valid = set(clients), self._valid()
        covered = {client for request in valid for client in request.clients}
        return [request for request in valid if wanted & set(request.clients)] if wanted <= covered else []

    def overdue(self) -> list[Request]:
        """Give the open requests whose time is over."""
        return [r for r in self.requests() if r.state in OPEN and r.detail["due_at"] < _now()]

    def unmet(self) -> list[Request]:
        """Give the requests that failed, and whose clients no other request covers."""
        return [r for r in self.requests() if r.state in FAILED and not self.covering(r.clients)]

    def _valid(self) -> list[Request]:
        return [request for request in self.requests() if request.state not in VOID]

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
        return sorted({client for r in self.requests() if r.state in states for client in r.clients})

    def applied(self) -> int:
        """Count the requests that have been applied."""
        return sum(request.state in FORGOTTEN for request in self.requests())

    def advance(self, request: Request, state: State, **detail: Any) -> Request:
        """Move a request to `state`, adding `detail` to its receipt; one that was cancelled meanwhile stays so."""
        with self._transaction():
            if self.request(request.id).state != State.CANCELLED:
                self._advance(request, state, detail)
        return self.request(request.id)

    def cancel(self, request_id: str, *, signed: Mapping[str, Any] | None = None) -> Request:
        """Take a request back.

        Args:
            request_id: of the request.
            signed: what its clients' key has signed.

        Raises:
            UserError: there is none of that id, or it was taken up already.
        """
        with self._transaction():
            self._check_unused(signed)
            request = self.request(request_id)
            if request.state not in (State.RECEIVED, State.CANCELLED):
                raise UserError(f"request {request_id} is {request.state}: only a RECEIVED one can be taken back")
            self._advance(request, State.CANCELLED, {"cancelled": dict(signed)} if signed else {})
        return self.request(request_id)

    def accept(self, request_id: str, by: str) -> Request:
        """Have a request applied once more, and its model taken whatever the gate says; a finite one it must be.

        Args:
            by: who answers for that.

        Raises:
            UserError: there is no such request, it is not one that the gate has set aside, or another one covers it.
        """
        with self._transaction():
            request = self.request(request_id)
            if later := self.covering(request.clients):
                raise UserError(f"request {request_id} is not needed any more: {later[0].id} is {later[0].state}")
            if request.state != State.QUARANTINED or "gate" not in request.detail:
                raise UserError(
                    f"request {request_id} is {request.state}: the gate has set nothing aside to be accepted"
                )
            self._advance(request, State.COLLECTING, {"accepted_by": by, "accepted_at": _now(), "attempts": 0})
        return self.request(request_id)

    def commit(
        self, round_: int, checkpoint: str, sha256: str, *, request: Request | None = None, **detail: Any
    ) -> Request | None:
        """Make `checkpoint` the current model; with `request`, move that to APPLIED in the same transaction."""
        with self._transaction():
            self._record(round=round_, checkpoint=checkpoint, sha256=sha256)
            if request is not None:
                self._advance(request, State.APPLIED, detail)
        return None if request is None else self.request(request.id)

    def current(self) -> Current | None:
        """The last commit, or None before the first."""
        return self._standing().current

    def finish(self) -> bool:
        """Mark the run as finished, unless a request is open; returns whether it is.

        A request that is filed later finds the mark, and knows that this process will not look again.
        """
        with self._transaction():
            if any(request.state in OPEN for request in self.requests()):
                return False
            self._record(finished=True)
            return True

    def reopen(self) -> None:
        """Take back the mark of `finish`: this process will look at requests again."""
        with self._transaction():
            if (current := self.current()) and current.finished:
                self._record(finished=False)

    def examples(self) -> dict[int, int]:
        """Give how many examples each client has, as its node said when it was there first."""
        return dict(self._standing().examples)

    def keep_examples(self, examples: Mapping[int, int]) -> None:
        """Keep the examples of clients that were not there before."""
        with self._transaction():
            known = self._standing().examples
            if new := {str(client): count for client, count in examples.items() if client not in known}:
                self._record(examples=new)

    def keep_about(self, sha256: str) -> None:
        """Keep the SHA-256 of the run's `run.json`, before that is written."""
        with self._transaction():
            if self._standing().about[-1:] != [sha256]:
                self._record(about=sha256)

    def about_written(self) -> None:
        """Keep that `run.json` has been written."""
        with self._transaction():
            self._record(about_written=True)

    def unwitnessed(self) -> list[int]:
        """Give how many events there were where somebody had removed the head that is kept outside."""
        return list(self._standing().unwitnessed)

    def about(self) -> list[str]:
        """Give the SHA-256 of `run.json`; before it that of an earlier one, as long as it may still be there."""
        return list(self._standing().about)

    def nonces(self) -> set[str]:
        """Give the numbers that signed requests have used."""
        return set(self._standing().nonces)

    def _check_unused(self, signed: Mapping[str, Any] | None) -> None:
        if signed and signed["nonce"] in self._standing().nonces:
            raise UserError("what was signed was filed before")

    def write_down(self, clients: Iterable[int], action: str, reason: str) -> None:
        """Write down that somebody asked for something and may not."""
        with self._transaction():
            self._record(turned_away=sorted(clients), action=action, reason=reason)

    def keep_receipt(self, request: Request, file: str, sha256: str, *, round_: int | None) -> None:
        """Keep the SHA-256 of a request's receipt, and the round of which it says something later."""
        with self._transaction():
            self._record(receipt=file, of=request.id, ended=request.state, as_of=round_, sha256=sha256)

    def keep_purge(self, request: Request, *, deleted: Sequence[str], kept: Sequence[Mapping[str, str]]) -> None:
        """Keep what was removed of a request's clients, and what is left, each as `what` and `why`."""
        with self._transaction():
            self._record(purged=request.id, deleted=list(deleted), kept=list(kept))

    def purged(self) -> list[Request]:
        """Give the requests after which what was left of their clients was removed."""
        return [request for request in self.requests() if request.id in self._standing().purged]

    def is_told(self, request: Request) -> bool:
        """Say whether the last receipt of a request that has ended is about how it stands now."""
        about = self.receipts(request.id)
        return bool(about) and about[-1][0] == request.state and self._standing().purged.get(request.id) != len(about)

    def readmit(self, clients: Mapping[int, str]) -> None:
        """Keep that clients train here although another run has forgotten them: by client, which one."""
        with self._transaction():
            self._record(readmitted={str(client): where for client, where in clients.items()})

    def receipts(self, request_id: str) -> list[tuple[str, int | None]]:
        """Give of each receipt of a request the state that it is about, and the round, if it is a later one."""
        return list(self._standing().receipts.get(request_id, []))

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first, each with the time and the hash of its leaf in the Merkle tree."""
        self._standing()
        rows = self._rows("SELECT at, event FROM events ORDER BY number")
        return [{"at": at, **json.loads(event), "hash": merkle.leaf(entry(at, event)).hex()} for at, event in rows]

    @property
    def key(self) -> str:
        """The id of the key that signs.

        Raises:
            UserError: there are no events yet.
        """
        self._standing()
        if not self._key:
            raise UserError(f"{self._path} has no events yet")
        return self._key

    def head(self) -> Head:
        """Give what stands for all events; it is not signed yet."""
        return Head(self.key, len(self._tree.leaves), self._tree.root().hex())

    def signed_head(self) -> Head:
        """Give what stands for all events, signed."""
        head = self.head()
        return replace(head, signature=self._sign(head.message))

    def kept_head(self) -> Head | None:
        """Read the head as it is kept outside of the database, if it is."""
        try:
            return Head(**json.loads(self._head_file.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise TamperedError(f"{self._head_file} is damaged ({error}): put back a copy of it") from error

    def evidence(self, numbers: Iterable[int]) -> tuple[list[tuple[int, str, str, list[str]]], Head]:
        """Give events with the proofs that they are among those of a signed head, and that head.

        Args:
            numbers: of the events, from 1.

        Returns:
            Number, time, text and proof of each, and the head.
        """
        head = self.signed_head()
        rows = self._rows("SELECT number, at, event FROM events")
        leaves, wanted = self._tree.leaves[: head.size], set(numbers)
        events = [
            (number, at, event, [step.hex() for step in merkle.proof(leaves, number - 1)])
            for number, at, event in rows
            if number in wanted
        ]
        return events, head

    def _advance(self, request: Request, state: State, detail: dict[str, Any]) -> None:
        self._record(request=request.id, state=state, **detail)

    # Events, and what follows from them --------------------------------------------------------------------------

    def _begin_reading(self) -> None:
        self._found, self._tree = Standing(), merkle.Tree()
        self._key = self._last_at = ""
        self._compared = self._is_witnessed = False

    def _standing(self) -> Standing:
        """Read the events that were not read before, and check that they are the run's."""
        try:
            self._read_on()
        except BaseException:
            self._begin_reading()
            raise
        return self._found

    def _read_on(self) -> None:
        kept = None if self._compared else self.kept_head()  # before the events: those go on meanwhile
        seen = len(self._tree.leaves)
        rows = self._rows("SELECT number, at, event, signature FROM events WHERE number > ? ORDER BY number", (seen,))
        for row in rows:
            self._take(*row, is_last=row is rows[-1])
            if kept and kept.size == len(self._tree.leaves):
                self._compare(kept)
        if self._rows("SELECT count(*) FROM events")[0][0] < len(self._tree.leaves):
            raise self._tampered("events were removed")
        if kept and len(self._tree.leaves) < kept.size:
            raise self._tampered(f"it has {len(self._tree.leaves)} events, and had {kept.size}")
        if not self._compared:
            self._compared, self._is_witnessed = True, kept is not None or len(rows) <= FIRST

    def _take(self, number: int, at: str, text: str, signature: str, *, is_last: bool) -> None:
        """Take in an event that is the next one; the last one, and one that changes the key, must be signed."""
        if number != len(self._tree.leaves) + 1:
            raise self._tampered(f"event {len(self._tree.leaves) + 1} is missing")
        try:
            event = json.loads(text)
            key = event["key"] if "ledger" in event else ""
            self._found.follow(at, event)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._tampered(f"event {number} is none") from error
        self._tree.append(merkle.leaf(entry(at, text)))
        self._key = self._key or key
        if (is_last or key) and not keys.is_signed(signature, self._row_message(), self._key):
            raise self._tampered(f"what is there up to event {number} is not signed")
        self._key, self._last_at = key or self._key, at

    def _row_message(self) -> bytes:
        """What the signature of the last event is under; no head is signed so."""
        return b"event of a " + Head(self._key, len(self._tree.leaves), self._tree.root().hex()).message

    def _compare(self, kept: Head) -> None:
        """Raise TamperedError unless the events so far are those that were there when a head was kept."""
        if not kept.is_signed:
            raise TamperedError(f"{self._head_file} is not signed by the run: put back a copy of it")
        if (kept.key, kept.root) != (self._key, self._tree.root().hex()):
            raise self._tampered(f"its first {kept.size} events are others than they were")

    def _record(self, at: str = "", /, **event: Any) -> None:
        at, text = at or self._time(), json.dumps(event, sort_keys=True)
        self._tree.append(merkle.leaf(entry(at, text)))
        row = (len(self._tree.leaves), at, text, self._sign(self._row_message()))
        self._execute("INSERT INTO events VALUES (?, ?, ?, ?)", row)
        self._last_at = at
        self._found.follow(at, json.loads(text))

    def _time(self) -> str:
        """The time, which never goes back, whatever the clock does."""
        return max(_now(), self._last_at)

    def _new_key(self, **about: Any) -> None:
        """Go on with a key of this run's own; an earlier key signs that."""
        key = keys.new_key(folder=self.keys)
        self._key = self._key or key
        self._record(key=key, ledger=FORMAT, **about)
        self._key = key

    def _sign(self, message: bytes) -> str:
        return keys.load(keys.file_of(self.keys, self._key)).sign(message).hex()

    def _keep_head(self) -> None:
        """Write the head outside of the database, signed: a transaction that is lost afterwards shows."""
        with self._readable():
            write_atomically(self._head_file, json.dumps(asdict(self.signed_head())).encode())

    def _tampered(self, how: str) -> TamperedError:
        return TamperedError(
            f"{self._path} was changed by somebody without the run's key ({how}): keep it as evidence, and put back a "
            f"copy of the ledger that is as new as {self._head_file}"
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            self._standing()
            before = len(self._tree.leaves)
            if not self._key:
                self._new_key()
            if not self._is_witnessed:
                self._record(unwitnessed=before)
                self._is_witnessed = True
            yield
            is_changed = len(self._tree.leaves) > before
            self._execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._begin_reading()
            raise
        if is_changed:
            self._keep_head()

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        cursor = self._execute(query, values)
        with self._readable():
            return cursor.fetchall()

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Execute a statement; while another process has the file locked, say so and try again."""
        deadline = time.monotonic() + LOCKED_SECONDS
        said = False
        with self._readable():
            while True:
                try:
                    return self._db.execute(statement, values)
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                if not said:
                    log.info("waiting for another process to unlock %s, for %g s at most", self._path, LOCKED_SECONDS)
                    said = True

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what SQLite and the file system say into a line that names the file and the way out."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{self._path} cannot be used ({error}): {_way_out(str(error))}") from error


def _way_out(error: str) -> str:
    if "locked" in error:
        return f"another process has had it for {LOCKED_SECONDS:g} s: wait for that, or end it"
    if "full" in error or "No space" in error:
        return "free some space, then give the same command again: nothing is lost"
    if "readonly" in error or "unable to open" in error or "Permission" in error or "Read-only" in error:
        return "its folder must be writable; --home or FEDUNLEARN_HOME names another state folder"
    return "put back a copy of the file, or remove the run's folder"


def entry(at: str, event: str) -> bytes:
    """Give the bytes of an event that the Merkle tree is over."""
    return f"{at}\n{event}".encode()


def due(received_at: str, months: int) -> str:
    """Say by when a request has to be applied: so many calendar months later.

    Example:
        >>> due("2026-01-31T12:00:00+00:00", 1)
        '2026-02-28T12:00:00+00:00'
    """
    return (datetime.fromisoformat(received_at) + relativedelta(months=months)).isoformat()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
