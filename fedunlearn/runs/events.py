"""A log of signed events: nobody without its key can change, remove or add one unseen.

Each event is signed together with all before it. Their Merkle root, signed, is kept outside of the database too, so
that a log that was cut or put back shows.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedunlearn.errors import UNREADABLE, UserError
from fedunlearn.runs import keys, merkle
from fedunlearn.runs.database import Database
from fedunlearn.runs.files import write_atomically

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, event TEXT NOT NULL, signature TEXT NOT NULL)
"""
FORMAT = 2
RUNS = "runs"  # folder of a state folder


class EarlierVersionError(UserError):
    """A log was written by a version that did not sign events."""


class TamperedError(UserError):
    """A log is not as this run's processes wrote it."""


class Head(BaseModel):
    """What stands for the first events of a log: their Merkle root, signed with the run's key."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    key: str = Field(description="id of the run's key: the Ed25519 public key")
    size: int = Field(ge=1, description="how many events there were")
    root: str = Field(description="Merkle root over them")
    signature: str = Field(default="", description="the run's, under the three above")

    @property
    def message(self) -> bytes:
        """What is signed."""
        return f"fedunlearn ledger\n{self.key}\n{self.size}\n{self.root}\n".encode()

    @property
    def is_signed(self) -> bool:
        """Whether the signature is the run's."""
        return keys.is_signed(self.signature, self.message, self.key)


class Found(Protocol):
    """What follows from events."""

    def follow(self, at: str, event: dict[str, Any]) -> None:
        """Take one event in."""
        ...


T = TypeVar("T", bound=Found)


class EventLog(Generic[T]):
    """Opens (and makes) the log at `path`; several processes may have it open.

    Where the file cannot be written, it can be read. Keys lie in `keys`, heads in `heads`, of the run's state folder;
    of another run beside it.

    Args:
        path: of the SQLite file, in the run's folder.
        begin: gives what follows from no events; every event is shown to it once.

    Raises:
        UserError: from every method, where the file is damaged, locked for too long, on a full disk, or not as the
            run's processes wrote it (`TamperedError`).
    """

    def __init__(self, path: Path, begin: Callable[[], T]) -> None:
        folder = self.folder = path.parent
        state_folder = folder.parent.parent if folder.parent.name == RUNS else folder
        self.keys = state_folder / "keys"
        self.head_file = state_folder / "heads" / f"{folder.name}.json"
        self._begin = begin
        is_new = not path.exists()
        self._db = Database(path)
        self._begin_reading()
        if is_new or self._db.is_writable:
            self._db.execute(SCHEMA)
        columns = [row[1] for row in self._db.rows("PRAGMA table_info(events)")]
        if columns and "signature" not in columns:
            raise EarlierVersionError(
                f"{path} was written by an earlier version of fedunlearn: finish the run with that version"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def copy_to(self, other: "EventLog[T]") -> None:
        """Copy everything into another log, which goes on with a key of its own."""
        root = self.head().root
        other.begin_anew()
        self._db.copy_to(other._db)
        other._begin_reading()
        other.found()
        other._is_witnessed = self._is_witnessed
        with other.transaction():
            other._new_key(fork_of=root)

    def begin_anew(self) -> None:
        """Put the head of an earlier run of the same name aside: this run begins without events.

        So is the head of a run that was killed before its first events were final.
        """
        if not self._db.rows("SELECT 1 FROM events LIMIT 1") and self.head_file.exists():
            ended = f"{self.head_file.stem}.ended-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.json"
            self.head_file.rename(self.head_file.with_name(ended))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Have the events that are recorded inside become final together, or not at all.

        The head is kept after them. That of the first ones is kept before: so no log with events was ever without one.
        """
        is_first = False
        try:
            with self._db.transaction():
                self.found()
                before = len(self._tree.leaves)
                is_first = not self._key
                if is_first:
                    self._new_key()
                if not self._is_witnessed:
                    self.record(unwitnessed=before)
                    self._is_witnessed = True
                yield
                is_changed = len(self._tree.leaves) > before
                if is_first:
                    self._keep_head()
        except BaseException:
            self._begin_reading()
            if is_first:
                self.begin_anew()
            raise
        if is_changed and not is_first:
            self._keep_head()

    def found(self) -> T:
        """Read the events that were not read before, check that they are the run's, and give what follows from all."""
        try:
            self._read_on()
        except BaseException:
            self._begin_reading()
            raise
        return self._found

    def record(self, at: str = "", /, **event: Any) -> None:
        """Add an event, in a transaction."""
        at, text = at or self.time(), json.dumps(event, sort_keys=True)
        self._tree.append(merkle.leaf(entry(at, text)))
        row = (len(self._tree.leaves), at, text, self._sign(self._row_message()))
        self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?)", row)
        self._last_at = at
        self._found.follow(at, json.loads(text))

    def time(self) -> str:
        """Give the time, which never goes back, whatever the clock does."""
        return max(now(), self._last_at)

    def events(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first, each with the time and the hash of its leaf in the Merkle tree."""
        self.found()
        rows = self._db.rows("SELECT at, event FROM events ORDER BY number")
        return [{"at": at, **json.loads(event), "hash": merkle.leaf(entry(at, event)).hex()} for at, event in rows]

    @property
    def key(self) -> str:
        """The id of the key that signs.

        Raises:
            UserError: there are no events yet.
        """
        self.found()
        if not self._key:
            raise UserError(f"{self._db.path} has no events yet")
        return self._key

    def head(self) -> Head:
        """Give what stands for all events; it is not signed yet."""
        return self._unsigned(self.key)

    def signed_head(self) -> Head:
        """Give what stands for all events, signed."""
        head = self.head()
        return head.model_copy(update={"signature": self._sign(head.message)})

    def kept_head(self) -> Head | None:
        """Read the head as it is kept outside of the database, if it is."""
        try:
            return Head.model_validate_json(self.head_file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise TamperedError(f"{self.head_file} is damaged ({reason}): put back a copy of it") from error

    def evidence(
        self, choose: Callable[[list[dict[str, Any]]], Iterable[int]]
    ) -> tuple[list[tuple[int, str, str, list[str]]], Head]:
        """Give events with the proofs that they are among those of a signed head, and that head.

        Args:
            choose: gives the numbers of the events, from 1; it is shown all that the head stands for.

        Returns:
            Number, time, text and proof of each, and the head.
        """
        head = self.signed_head()
        rows = self._db.rows("SELECT number, at, event FROM events WHERE number <= ? ORDER BY number", (head.size,))
        leaves, wanted = self._tree.leaves[: head.size], set(choose([json.loads(event) for _, _, event in rows]))
        events = [
            (number, at, event, [step.hex() for step in merkle.proof(leaves, number - 1)])
            for number, at, event in rows
            if number in wanted
        ]
        return events, head

    def _begin_reading(self) -> None:
        self._found, self._tree = self._begin(), merkle.Tree()
        self._key = self._last_at = ""
        self._compared = self._is_witnessed = False

    def _read_on(self) -> None:
        kept = None if self._compared else self.kept_head()  # before the events: those go on meanwhile
        if kept and not kept.is_signed:
            raise TamperedError(f"{self.head_file} is not signed by the run: put back a copy of it")
        seen = len(self._tree.leaves)
        rows = self._db.rows(
            "SELECT number, at, event, signature FROM events WHERE number > ? ORDER BY number", (seen,)
        )
        for row in rows:
            self._take(*row, is_last=row is rows[-1])
            if kept and kept.size == len(self._tree.leaves):
                self._compare(kept)
        if self._db.rows("SELECT count(*) FROM events")[0][0] < len(self._tree.leaves):
            raise self._tampered("events were removed")
        if kept and len(self._tree.leaves) < kept.size:
            raise self._tampered(f"it has {len(self._tree.leaves)} events, and had {kept.size}")
        if not self._compared:
            self._compared, self._is_witnessed = True, kept is not None or not rows

    def _take(self, number: int, at: Any, text: Any, signature: Any, *, is_last: bool) -> None:
        """Take in an event that is the next one; the last one, and one that changes the key, must be signed."""
        if number != len(self._tree.leaves) + 1:
            raise self._tampered(f"event {len(self._tree.leaves) + 1} is missing")
        try:
            event = json.loads(text)
            key = event["key"] if "ledger" in event else ""
            if not isinstance(at, str) or not isinstance(text, str) or not (key == "" or keys.is_id(key)):
                raise ValueError("it is of another form")
            self._found.follow(at, event)
        except UNREADABLE as error:
            raise self._tampered(f"event {number} is none") from error
        self._tree.append(merkle.leaf(entry(at, text)))
        self._key = self._key or key
        if (is_last or key) and not keys.is_signed(signature, self._row_message(), self._key):
            raise self._tampered(f"what is there up to event {number} is not signed")
        self._key, self._last_at = key or self._key, at

    def _row_message(self) -> bytes:
        """What the signature of the last event is under; no head is signed so."""
        return b"event of a " + self._unsigned(self._key).message

    def _compare(self, kept: Head) -> None:
        """Raise TamperedError unless the events so far are those that were there when a head was kept."""
        if (kept.key, kept.root) != (self._key, self._tree.root().hex()):
            raise self._tampered(f"its first {kept.size} events are others than they were")

    def _unsigned(self, key: str) -> Head:
        return Head(key=key, size=len(self._tree.leaves), root=self._tree.root().hex())

    def _new_key(self, **about: Any) -> None:
        """Go on with a key of this run's own; an earlier key signs that."""
        key = keys.new_key(folder=self.keys)
        self._key = self._key or key
        self.record(key=key, ledger=FORMAT, **about)
        self._key = key

    def _sign(self, message: bytes) -> str:
        return keys.signature_of(keys.load(keys.file_of(self.keys, self._key)), message)

    def _keep_head(self) -> None:
        """Write the head outside of the database, signed: a transaction that is lost afterwards shows."""
        with self._db.readable():
            write_atomically(self.head_file, self.signed_head().model_dump_json().encode())

    def _tampered(self, how: str) -> TamperedError:
        return TamperedError(
            f"{self._db.path} was changed by somebody without the run's key ({how}): keep it as evidence, and put back "
            f"a copy of the ledger that is as new as {self.head_file}"
        )


def entry(at: str, event: str) -> bytes:
    """Give the bytes of an event that the Merkle tree is over."""
    return f"{at}\n{event}".encode()


def now() -> str:
    """Give the time by the clock, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
