"""Clients by name: inside they are numbers, and at the edges they have the names of the owners of their images."""

import difflib
import re
from collections.abc import Iterable, Sequence
from unicodedata import normalize

from fedunlearn.errors import UserError, printable

MOST_NAMED = 4
"""Clients in a sentence."""


def name_of(client: int, names: Sequence[str] = ()) -> str:
    """Give a client's name as text can show it; its number where clients have no names.

    A name that could be misread in a sentence is in quotes.

    Example:
        >>> name_of(1, ["hospital_a", "St. Mary, Ward 2"]), name_of(1)
        ("'St. Mary, Ward 2'", '1')
    """
    if client >= len(names):
        return str(client)
    name = printable(names[client])
    return name if re.fullmatch(r"[\w.-]+", name) else f"'{name}'"


def named(clients: Sequence[int], names: Sequence[str] = (), *, capital: bool = False, most: int = MOST_NAMED) -> str:
    """Name clients in a sentence.

    Args:
        clients: by number.
        names: of all clients by number, where they have names.
        capital: whether it begins the sentence.
        most: how many are named.

    Example:
        >>> named([3, 5]), named([1], ["hospital_a", "hospital_b"])
        ('clients 3 and 5', 'client hospital_b')
    """
    words = [name_of(client, names) for client in clients]
    if len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    text = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"{'C' if capital else 'c'}lient{'s' if len(clients) > 1 else ''} {text}"


def numbers_of(texts: Iterable[str], names: Sequence[str] = ()) -> list[int]:
    """Read the clients that somebody typed: a name, a number, or several with commas between them.

    Where clients have names, a text that is one of them is that client, also if it looks like a number.

    Raises:
        UserError: a text is neither, with the nearest name.

    Example:
        >>> numbers_of(["hospital_b,0"], ["hospital_a", "hospital_b"]), numbers_of(["3,5"])
        ([1, 0], [3, 5])
    """
    words = [word for text in texts for word in ([text] if not text or _place(text, names) >= 0 else text.split(","))]
    return [number_of(word, names) for word in words]


def number_of(text: str, names: Sequence[str] = ()) -> int:
    """Read one client that somebody typed.

    Raises:
        UserError: it is neither a name nor a number.

    Example:
        >>> number_of("3", ["7", "3"]), number_of("3")
        (1, 3)
    """
    if (place := _place(text, names)) >= 0:
        return place
    if re.fullmatch(r"\s*-?\d{1,9}\s*", text):
        return int(text)
    if not names:
        raise UserError(f"client {text[:20]!r} is not a whole number of at most 9 digits")
    near = difflib.get_close_matches(text, names, 1, 0.5)
    known = ", ".join(name_of(client, names) for client in range(min(len(names), 10)))
    hint = f"did you mean {printable(near[0])}?" if near else f"there are {known}{', ...' if len(names) > 10 else ''}"
    raise UserError(f"no client is called {printable(text[:60])!r}: {hint}")


def _place(text: str, names: Sequence[str]) -> int:
    """Find a name, written with composed or with combining characters; -1 where there is none."""
    if text in names:
        return list(names).index(text)
    plain = [normalize("NFC", name) for name in names]
    wanted = normalize("NFC", text.strip())
    return plain.index(wanted) if wanted in plain else -1
