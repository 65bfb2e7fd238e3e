"""The one exception that is meant for the person at the terminal."""


class UserError(Exception):
    """One line that names the value, the allowed range and the way out."""
