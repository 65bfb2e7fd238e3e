"""The lock of a folder, which one process has at a time and which dies with it."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError

ELSEWHERE = "--home or FEDUNLEARN_HOME names another state folder"
TRAINS = " trains"  # what a lock says beside the process's id


class LockedError(UserError):
    """Another process has the lock.

    Attributes:
        folder: whose lock it is.
    """

    def __init__(self, reason: str, folder: Path) -> None:
        super().__init__(reason)
        self.folder = folder


@contextmanager
def lock(folder: Path, *, of: str = "", trains: bool = False, patience: float = 0.5) -> Iterator[None]:
    """Have the folder's lock.

    Args:
        folder: of a run, or of something else.
        of: what it is of, in words; a run by default.
        trains: whether this process trains the run, or applies its requests; the lock says so.
        patience: seconds.

    Raises:
        LockedError: another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): {ELSEWHERE}") from error
    with file:
        if not _try(file, fcntl.LOCK_EX, patience=patience):
            locked = f"{of or f'run {folder.name}'} is locked by process {holder(folder)}"
            raise LockedError(f"{locked}: wait for it, or end it", folder)
        file.truncate(0)
        file.write(f"{os.getpid()}{TRAINS if trains else ''}")
        file.flush()
        yield


def is_locked(folder: Path, *, patience: float = 0.5) -> bool:
    """Say whether a process has the folder's lock, and keeps it for `patience` seconds.

    Raises:
        UserError: nobody can say.
    """
    try:
        with open(folder / "lock") as file:
            return not _try(file, fcntl.LOCK_SH, patience=patience)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{folder / 'lock'} cannot be read ({error.strerror})") from error


def holder(folder: Path) -> str:
    """Give the id of the process that took the lock last; `?` while it is about to say it."""
    return (folder / "lock").read_text().removesuffix(TRAINS) or "?"


def holder_trains(folder: Path) -> bool:
    """Say whether that process took the lock to train the run, or to apply its requests."""
    return (folder / "lock").read_text().endswith(TRAINS)


def _try(file: Any, kind: int, *, patience: float = 0.5) -> bool:
    """Whether the lock was got; `patience` (seconds) outlasts somebody who only looks whether it is taken."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(f"{file.name}: files cannot be locked here ({error.strerror}): {ELSEWHERE}") from error
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True
