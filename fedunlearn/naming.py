"""Clients by name: inside they are numbers, and at the edges they have the names of the owners of their images."""

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any
from unicodedata import normalize

from fedunlearn.data.selection import Portion, has_numbers
from fedunlearn.errors import UserError, printable

MOST_NAMED = 4
"""Clients in a sentence."""
MOST_LISTED = 10
"""Clients in a list of those that there are."""


class PortionName(str):
    """Names a portion of a client's images in a sentence, as `class 5 of client 3`.

    Attributes:
        selection: which images, in words.
        client: whose.
        is_empty: whether the client has none of them.
        of_all: whether all clients' images were meant.

    Example:
        >>> PortionName("class 5", 1, ["hospital_a", "hospital_b"])
        'class 5 of client hospital_b'
    """

    selection: str
    client: int
    is_empty: bool
    of_all: bool

    def __new__(
        cls, selection: str, client: int, names: Sequence[str] = (), *, is_empty: bool = False, of_all: bool = False
    ) -> "PortionName":
        """Make a name of words."""
        found = super().__new__(cls, f"{selection} of {named([client], names)}")
        found.selection, found.client, found.is_empty, found.of_all = selection, client, is_empty, of_all
        return found


def with_portions(
    names: Sequence[str],
    portions: Mapping[int, Portion],
    class_names: Sequence[str],
    examples: Mapping[int, int],
    of_all: Collection[int] = (),
) -> Sequence[str]:
    """Give names of all clients and then of all portions of clients, by number.

    Args:
        names: of clients; none where they have numbers alone.
        portions: by number, from the number of clients on; some numbers may be missing.
        class_names: K names.
        examples: of clients and portions, as far as they are known.
        of_all: portions that were asked for of all clients.
    """
    if not portions:
        return names
    own = {
        number: PortionName(
            p.selection.in_words(class_names),
            p.client,
            names,
            is_empty=not examples.get(number, 1),
            of_all=number in of_all,
        )
        for number, p in portions.items()
    }
    clients = dict(enumerate(names))
    return [own.get(number) or clients.get(number, str(number)) for number in range(max(own) + 1)]


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
    if isinstance(names[client], PortionName):
        return name
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
        >>> both = [PortionName("class 5", 0), PortionName("class 5", 1)]
        >>> named([2, 3], ["0", "1", *both]), named([2, 3], ["0", "1", both[0], PortionName("", 1, is_empty=True)])
        ('class 5 of clients 0 and 1', 'class 5 of client 0')
    """
    groups: dict[str, list[int]] = {}
    for client in _with_images(clients, names):
        groups.setdefault(getattr(_name(client, names), "selection", ""), []).append(client)
    text = _together(
        [
            f"{printable(what)} of {_owners(own, names, most)}" if what else _clients(own, names, most)
            for what, own in groups.items()
        ]
    )
    return text[0].upper() + text[1:] if capital else text


def _with_images(clients: Sequence[int], names: Sequence[str]) -> Sequence[int]:
    """Leave out portions of clients that have none of the images, if others have some."""
    there = [c for c in clients if c >= len(names) or not getattr(names[c], "is_empty", False)]
    return there or clients


def _owners(portions: Sequence[int], names: Sequence[str], most: int) -> str:
    """Name those whose portions these are; all clients where all were meant, and are too many to be named."""
    own = [name for name in (_name(portion, names) for portion in portions) if isinstance(name, PortionName)]
    if len(own) > most + 1 and all(name.of_all for name in own):
        return "all clients"
    return _clients([name.client for name in own], names, most)


def _name(client: int, names: Sequence[str]) -> str:
    return names[client] if client < len(names) else ""


def _clients(clients: Sequence[int], names: Sequence[str], most: int) -> str:
    words = [name_of(client, names) for client in clients]
    if len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    return f"client{'s' if len(clients) > 1 else ''} {_together(words)}"


def _together(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def for_shell(word: str) -> str:
    """Write a word of a command as a shell takes it, so that it can be pasted; nothing in it is hidden.

    Example:
        >>> print(for_shell("run=demo"), for_shell("Ward 2"), for_shell("no" + chr(0xA0) + "break"))
        run=demo 'Ward 2' $'no\\U000000a0break'
    """
    if word.isprintable():
        return shlex.quote(word)
    plain = (c if c.isprintable() and c not in "\\'" else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(plain)}'"


def as_command(*words: str) -> str:
    """Write a command of this package as a shell takes it.

    Example:
        >>> print(as_command("run", "digits", "forget.schedule={1:[2,3]}"))
        fedunlearn run digits 'forget.schedule={1:[2,3]}'
    """
    return " ".join(map(for_shell, ("fedunlearn", *words)))


def as_typed(clients: Sequence[int], names: Sequence[str] = ()) -> str:
    """Write clients as a list in a setting, as somebody would type it there; a shell needs quotes around that.

    Example:
        >>> print(as_typed([0, 1], ["St. Mary, Ward 2", "b"]), as_typed([3]))
        ["St. Mary, Ward 2",b] [3]
    """
    own = [names[client] if client < len(names) else str(client) for client in clients]
    texts = (name if re.fullmatch(r"[\w.-]+", name) else f'"{_escaped(name)}"' for name in own)
    return f"[{','.join(texts)}]"


def _escaped(name: str) -> str:
    return re.sub(r'(["\\])', r"\\\1", name)


def listed(values: Any) -> list[Any]:
    """Give a list of names or numbers, also where there is one alone, or None: a text is one name, not its letters.

    Example:
        >>> listed("12"), listed(3), listed(("a", "b")), listed(None)
        (['12'], [3], ['a', 'b'], [])
    """
    if values is None:
        return []
    return [values] if isinstance(values, str | Integral) else list(values)


def numbers_of(texts: Iterable[str], names: Sequence[str] = ()) -> list[int]:
    """Read the clients that somebody typed: a name, a number, or several with commas between them.

    A number is a client's place among all clients, from 0. Where any client's name is a number, it is a name alone.

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
        UserError: it is no name; and no number either, or a name of some client is one.

    Example:
        >>> number_of("3", ["7", "3"]), number_of("3"), number_of("1", ["hospital_a", "hospital_b"])
        (1, 3, 1)
    """
    if (place := _place(text, names)) >= 0:
        return place
    is_place = re.fullmatch(r"\s*-?\d{1,9}\s*", text)
    if is_place and not has_numbers(names):
        return int(text)
    if not names:
        raise UserError(f"client {text[:20]!r} is not a whole number of at most 9 digits")
    near = difflib.get_close_matches(text, names, 1, 0.5)
    known = ", ".join(name_of(client, names) for client in range(min(len(names), MOST_LISTED)))
    all_names = f"there are {known}{', ...' if len(names) > MOST_LISTED else ''}"
    hint = f"did you mean {printable(near[0])}?" if near else all_names
    if is_place:
        hint = f"as names are numbers here, a number is a name; {all_names}"
    raise UserError(f"no client is called {printable(text[:60])!r}: {hint}")


def _place(text: str, names: Sequence[str]) -> int:
    """Find a name, written with composed or with combining characters; -1 where there is none."""
    if text in names:
        return list(names).index(text)
    plain = [normalize("NFC", name) for name in names]
    wanted = normalize("NFC", text.strip())
    return plain.index(wanted) if wanted in plain else -1


def class_numbers(texts: Iterable[str], names: Sequence[str]) -> list[int]:
    """Read the classes that somebody typed: a name, several with commas between them, or numbers.

    Where a class is called by a number, every number is a name.

    Raises:
        UserError: there is no such class; with the nearest name.

    Example:
        >>> class_numbers(["frog,0"], ["cat", "frog"]), class_numbers(["1"], ["2", "1"])
        ([1, 0], [1])
    """
    typed = [composed(text) for text in texts]
    words = [word for text in typed for word in ([text] if text in names else text.split(","))]
    return [names.index(word) if word in names else _class_number(word, names) for word in words]


def composed(text: str) -> str:
    """Give a text in composed characters, as names of classes are."""
    return normalize("NFC", text)


def _class_number(text: str, names: Sequence[str]) -> int:
    are_numbers = has_numbers(names)
    if text.isdecimal() and len(text) < 10 and int(text) < len(names) and not are_numbers:
        return int(text)
    near = [] if text.isdecimal() else difflib.get_close_matches(text, names, 1)
    known = ", ".join(map(printable, names[:10])) + (", ..." if len(names) > 10 else "")
    hints = [f"did you mean {printable(near[0])}?"] if near else []
    hints += [] if near or are_numbers else [f"or give a number in 0..{len(names) - 1}"]
    raise UserError(": ".join([f"class {printable(text[:40])!r} is not one of {known}", *hints]))
