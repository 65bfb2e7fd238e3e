"""The ledger of one run: forget requests, their states, the current checkpoint, and an audit chain, in SQLite.

A transaction of the ledger (`synchronous=FULL`) is the only commit point of a run.
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from logging import getLogger
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError


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
    "accepted_at", "accepted_by", "after", "attempts", "before", "clients", "completed_round", "completes_at", "costs",
    "gate", "kind", "not_before", "reason", "request", "round", "seconds", "stored_bytes", "strategy",
}  # fmt: skip  # what a receipt, or its row of metrics, says of every request
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
CREATE TABLE IF NOT EXISTS requests (
    number INTEGER PRIMARY KEY, clients TEXT NOT NULL, state TEXT NOT NULL, received_at TEXT NOT NULL,
    detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS current_checkpoint (
    one INTEGER PRIMARY KEY CHECK (one = 1), round INTEGER NOT NULL, checkpoint TEXT NOT NULL, sha256 TEXT NOT NULL,
    finished INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clients (client INTEGER PRIMARY KEY, examples INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, event TEXT NOT NULL, hash TEXT NOT NULL);
"""


class Ledger:
    """Opens (and makes) the ledger at `path`; several processes may have it open.

    Where the file cannot be written, it can be read.

    Raises:
        UserError: from every method, where the file is damaged, locked for too long, or on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._readable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=TRY_SECONDS, isolation_level=None, check_same_thread=False)
        self._execute("PRAGMA synchronous=FULL")
        if not path.exists() or os.access(path, os.W_OK):
            with self._transaction():
                for statement in SCHEMA.split(";"):
                    self._execute(statement)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def copy_to(self, other: "Ledger") -> None:
        """Copy everything into another ledger."""
        with self._readable():
            self._db.backup(other._db)

    def file(self, clients: Iterable[int], *, not_before: int = 0) -> list[Request]:
        """Ask for `clients` to be forgotten together, after round `not_before` at the earliest.

        Returns the earlier requests that cover some of them (those that are void do not), then a new one for the rest.
        """
        with self._transaction():
            wanted = sorted(set(clients))
            earlier = [r for r in self._valid() if set(r.clients) & set(wanted)]
            rest = [c for c in wanted if not any(c in r.clients for r in earlier)]
            if not rest:
                return earlier
            row = (json.dumps(rest), State.RECEIVED, _now(), json.dumps({"not_before": not_before}))
            number = self._execute(
                "INSERT INTO requests (clients, state, received_at, detail) VALUES (?, ?, ?, ?)", row
            ).lastrowid
            self._record(request=f"r{number}", state=State.RECEIVED, clients=rest)
            return [*earlier, self.request(f"r{number}")]

    def requests(self) -> list[Request]:
        """All requests, in order of arrival."""
        rows = self._rows("SELECT number, clients, state, received_at, detail FROM requests ORDER BY number")
        with self._readable():
            return [Request(f"r{n}", json.loads(c), State(s), at, json.loads(d)) for n, c, s, at, d in rows]

    def covering(self, clients: Iterable[int]) -> list[Request]:
        """Give the earlier requests, if any, that cover all of the clients together; void ones do not."""
        wanted, valid = set(clients), self._valid()
        covered = {client for request in valid for client in request.clients}
        return [request for request in valid if wanted & set(request.clients)] if wanted <= covered else []

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

    def advance(self, request: Request, state: State, **detail: Any) -> Request:
        """Move a request to `state`, adding `detail` to its receipt; one that was cancelled meanwhile stays so."""
        with self._transaction():
            if self.request(request.id).state != State.CANCELLED:
                self._advance(request, state, detail)
        return self.request(request.id)

    def cancel(self, request_id: str) -> Request:
        """Take a request back.

        Raises:
            UserError: there is none of that id, or it was taken up already.
        """
        with self._transaction():
            request = self.request(request_id)
            if request.state not in (State.RECEIVED, State.CANCELLED):
                raise UserError(f"request {request_id} is {request.state}: only a RECEIVED one can be taken back")
            self._advance(request, State.CANCELLED, {})
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
            self._execute(
                "INSERT OR REPLACE INTO current_checkpoint VALUES (1, ?, ?, ?, 0)", (round_, checkpoint, sha256)
            )
            self._record(round=round_, checkpoint=checkpoint, sha256=sha256)
            if request is not None:
                self._advance(request, State.APPLIED, detail)
        return None if request is None else self.request(request.id)

    def current(self) -> Current | None:
        """The last commit, or None before the first."""
        rows = self._rows("SELECT round, checkpoint, sha256, finished FROM current_checkpoint")
        return Current(*rows[0][:3], finished=bool(rows[0][3])) if rows else None

    def finish(self) -> bool:
        """Mark the run as finished, unless a request is open; returns whether it is.

        A request that is filed later finds the mark, and knows that this process will not look again.
        """
        with self._transaction():
            if any(request.state in OPEN for request in self.requests()):
                return False
            self._execute("UPDATE current_checkpoint SET finished = 1")
            self._record(finished=True)
            return True

    def reopen(self) -> None:
        """Take back the mark of `finish`: this process will look at requests again."""
        with self._transaction():
            self._execute("UPDATE current_checkpoint SET finished = 0")

    def examples(self) -> dict[int, int]:
        """Give how many examples each client has, as its node said when it was there first."""
        return dict(self._rows("SELECT client, examples FROM clients ORDER BY client"))

    def keep_examples(self, examples: Mapping[int, int]) -> None:
        """Keep the examples of clients that were not there before."""
        known = self.examples()
        if new := {client: count for client, count in examples.items() if client not in known}:
            with self._transaction():
                for client, count in new.items():
                    self._execute("INSERT INTO clients VALUES (?, ?)", (client, count))
                self._record(examples={str(client): count for client, count in new.items()})

    def events(self) -> list[dict[str, Any]]:
        """The audit chain, oldest first."""
        rows = self._rows("SELECT at, event, hash FROM events ORDER BY number")
        return [{"at": at, **json.loads(event), "hash": hash_} for at, event, hash_ in rows]

    def verify(self) -> bool:
        """Whether every event's hash is that of its content and of the event before it."""
        previous = ""
        for at, event, hash_ in self._rows("SELECT at, event, hash FROM events ORDER BY number"):
            if hash_ != _chain(previous, at, event):
                return False
            previous = hash_
        return True

    def _advance(self, request: Request, state: State, detail: dict[str, Any]) -> None:
        merged = self.request(request.id).detail | detail
        self._execute(
            "UPDATE requests SET state = ?, detail = ? WHERE number = ?",
            (state, json.dumps(merged), int(request.id.removeprefix("r"))),
        )
        self._record(request=request.id, state=state, **detail)

    def _record(self, **event: Any) -> None:
        last = self._rows("SELECT hash FROM events ORDER BY number DESC LIMIT 1")
        at, text = _now(), json.dumps(event, sort_keys=True)
        values = (at, text, _chain(last[0][0] if last else "", at, text))
        self._execute("INSERT INTO events (at, event, hash) VALUES (?, ?, ?)", values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._execute("COMMIT")

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        cursor = self._execute(query)
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


def _chain(previous: str, at: str, event: str) -> str:
    return hashlib.sha256("\n".join((previous, at, event)).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
