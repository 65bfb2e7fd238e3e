"""Errors that are meant for somebody."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError)
"""What reading raises where content from outside is not of the form that it should be of."""


class UserError(Exception):
    """What a person can put right: shown as one line, without a traceback, and ends a command with status 2."""


class OneLine(logging.Filter):
    """Lets others log a UserError as the line that it is, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop the traceback of a UserError; every record passes."""
        if record.exc_info and isinstance(record.exc_info[1], UserError):
            record.msg, record.args, record.exc_info = str(record.exc_info[1]), (), None
        return True


class NotNowError(Exception):
    """A forget request cannot be applied now: the state stays as it was, and the request is tried again later.

    A strategy raises it where clients that it needs did not reply, or where its result must not be used. Every other
    exception of a strategy is a bug and ends the run with its traceback.
    """


class DestroyedError(Exception):
    """The model is not finite, or nothing can be learned from it: it is never committed, and no client is to blame."""


def printable(text: str) -> str:
    """Write out what a terminal would act on or hide, so that a text from outside stays one line.

    Example:
        >>> printable("café" + chr(10) + chr(27) + "[8m")
        'café\\\\n\\\\x1b[8m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def unusable_replies() -> Iterator[None]:
    """Turn a ValueError over what clients sent into a NotNowError: other replies may do.

    Example:
        >>> with unusable_replies():
        ...     raise ValueError("negative variances")
        Traceback (most recent call last):
        fedunlearn.errors.NotNowError: negative variances
    """
    try:
        yield
    except ValueError as error:
        raise NotNowError(str(error)) from error
