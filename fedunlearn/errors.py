"""Errors that are meant for somebody."""


class UserError(Exception):
    """What a person can put right: shown as one line, without a traceback, and ends a command with status 2."""


class NotNowError(Exception):
    """A forget request cannot be applied now: the state stays as it was, and the request is tried again later.

    A strategy raises it where clients that it needs did not reply, or where its result must not be used. Every other
    exception of a strategy is a bug and ends the run with its traceback.
    """
