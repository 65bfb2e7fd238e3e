"""A SQLite file that several processes have open; what goes wrong is one line that names the file and the way out."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError

TRY_SECONDS = 5  # until a lock of another process is spoken of
LOCKED_SECONDS = 60  # until it is given up

log = getLogger("fedunlearn")


class Database:
    """Opens (and makes) the file; a transaction is on the disk when it ends.

    With `synchronous=FULL` a loss of power could bring the journal back, and take the last transaction back.

    Raises:
        UserError: from every method, where the file is damaged, locked for too long, or on a full disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.readable():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=TRY_SECONDS, isolation_level=None, check_same_thread=False)
        self.execute("PRAGMA synchronous=EXTRA")

    @property
    def is_writable(self) -> bool:
        """Whether this process may write the file."""
        return os.access(self.path, os.W_OK)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def copy_to(self, other: "Database") -> None:
        """Copy everything into another file."""
        with self.readable():
            self._db.backup(other._db)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Have all that is executed inside become final together, or not at all."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Give all rows of a query."""
        cursor = self.execute(query, values)
        with self.readable():
            return cursor.fetchall()

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Execute a statement; while another process has the file locked, say so and try again."""
        deadline = time.monotonic() + LOCKED_SECONDS
        said = False
        with self.readable():
            while True:
                try:
                    return self._db.execute(statement, values)
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise
                if not said:
                    log.info("waiting for another process to unlock %s, for %g s at most", self.path, LOCKED_SECONDS)
                    said = True

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Turn what SQLite and the file system say into a line that names the file and the way out."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise UserError(f"{self.path} cannot be used ({error}): {_way_out(str(error))}") from error


def _way_out(error: str) -> str:
    if "locked" in error:
        return f"another process has had it for {LOCKED_SECONDS:g} s: wait for that, or end it"
    if "full" in error or "No space" in error:
        return "free some space, then give the same command again: nothing is lost"
    if "readonly" in error or "unable to open" in error or "Permission" in error or "Read-only" in error:
        return "its folder must be writable; --home or FEDUNLEARN_HOME names another state folder"
    return "put back a copy of the file, or remove the run's folder"
