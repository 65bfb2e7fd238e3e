"""A run at a glance, also one that is damaged."""

import os
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedunlearn.errors import UNREADABLE, UserError
from fedunlearn.runs.ledger import Request
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.run import open_ledger, read_about

LIVE, IDLE, DAMAGED = "live", "idle", "damaged"
UNUSABLE = (UserError, OSError, *UNREADABLE)
"""What looking at a damaged run raises."""


@dataclass(frozen=True)
class Glance:
    """How far a run is, and what was asked of it.

    Attributes:
        run: its name.
        state: `live` while a process holds it, else `idle`; `damaged` where it cannot be read.
        error: what is wrong with a damaged one.
        round: after which the current model is.
        rounds: that it is to train.
        data: name of the data set.
        strategy: its own.
        created: time at which it was made.
        requests: all of them, in order of arrival.
        overdue: those of them whose time is over.
    """

    run: str
    state: str = DAMAGED
    error: str = ""
    round: int = 0
    rounds: int = 0
    data: str = ""
    strategy: str = ""
    created: str = ""
    requests: list[Request] = field(default_factory=list)
    overdue: list[Request] = field(default_factory=list)


def glance(folder: Path) -> Glance:
    """Look at a run; nothing is written, and nobody who holds it is disturbed."""
    try:
        about = read_about(folder)
        with closing(open_ledger(folder)) as ledger:
            current = ledger.current()
            return Glance(
                folder.name,
                state=LIVE if is_locked(folder, patience=0) else IDLE,
                round=current.round if current else 0,
                rounds=about["config"]["rounds"],
                data=about["config"]["data"]["name"],
                strategy=about["config"]["strategy"],
                created=about["created"],
                requests=ledger.requests(),
                overdue=ledger.overdue(),
            )
    except UNUSABLE as error:
        return damaged(folder, error)


def damaged(folder: Path, error: Exception) -> Glance:
    """Say of a run what is wrong with it."""
    is_said = isinstance(error, UserError | OSError)
    text = str(error) if is_said else f"it is not as this version writes it ({type(error).__name__}: {error})"
    return Glance(folder.name, error=text)


def size_of(folder: Path) -> int:
    """Add up the bytes of a folder's files; those that vanish meanwhile, as beside a live run, do not count."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += Path(place, name).stat().st_size
    return size
