"""Log lines for people: on stderr, ours alone unless more is asked for."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TextIO

ROUNDS = "fedunlearn.rounds"
"""The logger of the one line a round."""

FIRST_WORD = 5
"""Seconds until a wait is spoken of."""

_prefix: ContextVar[str] = ContextVar("prefix", default="")


class _ToStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the moment, since Flower and tests put something else there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.addFilter(self._prefixed)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        pass

    @staticmethod
    def _prefixed(record: logging.LogRecord) -> bool:
        if _prefix.get():
            record.msg, record.args = f"{_prefix.get()}: {record.getMessage()}", ()
        return True


def set_up(*, verbose: bool = False) -> None:
    """Show our lines on stderr, and those of Flower and Ray only if `verbose`."""
    logger = logging.getLogger("fedunlearn")
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not verbose:
        for name in ("flwr", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")


@contextmanager
def waiting(thing: str, *, limit: float) -> Iterator[None]:
    """Say what is waited for, and for how long at most, where it takes more than a few seconds."""
    say = logging.getLogger("fedunlearn").info
    timer = threading.Timer(FIRST_WORD, say, ("waiting for %s, for %g s at most", thing, limit))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Begin every line that is logged in this context with `prefix`."""
    token = _prefix.set(prefix)
    try:
        yield
    finally:
        _prefix.reset(token)
