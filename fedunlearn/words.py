"""Settings as people type them: `name=value`, in words or in one text, and as Hydra reads them."""

import re
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedunlearn.errors import UserError
from fedunlearn.schema import fields_of, is_mapping, name_of

_SCALES = ("auto", "full", "laptop")
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


def split_words(text: str) -> list[str]:
    """Split a text into words, which begin where `name=` does, but not within brackets or quotes around a whole value.

    Example:
        >>> split_words("a=1 b={6: ['c d=e']} c=x y d='/x y=2/z'")
        ['a=1', "b={6: ['c d=e']}", 'c=x y', "d='/x y=2/z'"]
    """
    pieces = re.split(r"(\s+)(?=[~+]*[\w./@]+=)", text.strip())
    words: list[str] = []
    for place, piece in enumerate(pieces):
        if words and (not piece.strip() or _is_open(words[-1]) or _is_quoted(words[-1], pieces[place:])):
            words[-1] += piece
        else:
            words.append(piece)
    return [word.strip() for word in words if word.strip()]


def _is_open(word: str) -> bool:
    """Say whether a bracket is still open at the end of a word; those in quotes do not count."""
    plain = re.sub(r"""(?<=[\[{,:\s])("(?:\\.|[^"\\])*("|$)|'(?:\\.|[^'\\])*('|$))""", "", word)
    return sum(_BRACKETS.get(character, 0) for character in plain) > 0


def _is_quoted(word: str, rest: list[str]) -> bool:
    """Say whether the value of a word begins with a quote that only what follows closes."""
    value = word.partition("=")[2].strip()
    quote = value[:1]
    is_open = quote in ("'", '"') and not (len(value) > 1 and value.endswith(quote))
    return bool(quote) and is_open and any(piece.endswith(quote) for piece in rest)


def texts_of(words: Iterable[str], schema: type[BaseModel]) -> dict[str, Any]:
    """Give the settings among words that are text, or lists and mappings of text, as they were typed.

    Args:
        words: `name=value` each.
        schema: that says which settings are text.

    Returns:
        Values by dotted name; the last of several counts.

    Raises:
        UserError: a list or mapping that cannot be read, or a key that is twice in one: only the last would count.

    Example:
        >>> from fedunlearn.config import Config
        >>> texts_of(["run=1.10", "rounds=3", "forget.keys={3: 695e0514}"], Config)
        {'run': '1.10', 'forget.keys': {'3': '695e0514'}}
    """
    known = dict(fields_of(schema))
    found: dict[str, Any] = {}
    for word in words:
        name, text = name_of(word), unquoted(word.partition("=")[2])
        declared = known.get(name)
        check_repeated(name, text, of_numbers=declared is not None and not has_text(declared))
        above = known.get(name.rpartition(".")[0])
        if declared is not None and has_text(declared):
            found[name] = text if declared.annotation is str else read_texts(name, text)
        elif above is not None and is_mapping(above) and has_text(above):
            found[name] = read_texts(name, text)
        elif text.startswith("{"):
            found |= {
                f"{name}.{leaf}": value for leaf, value in _in_group(name, text).items() if _is(known, name, leaf)
            }
    return found


class RepeatedError(UserError):
    """A mapping has a key twice."""


def check_repeated(name: str, text: str, *, of_numbers: bool) -> None:
    """Raise RepeatedError where a mapping, or one inside, has a key twice; with `of_numbers` 6 and 06 are one key."""
    try:
        value = read_texts(name, text)
    except RepeatedError:
        raise
    except UserError:  # whoever reads it in another way says what is wrong
        return
    keys = [int(key) if of_numbers and key.isdecimal() else key for key in value] if isinstance(value, dict) else []
    if repeated := [key for place, key in enumerate(keys) if key in keys[:place]]:
        raise RepeatedError(f"{name}={text} has {repeated[0]} twice")


def _in_group(name: str, text: str) -> dict[str, Any]:
    with suppress(UserError):  # whoever reads the other settings of the group says it better
        return read_texts(name, text)
    return {}


def _is(known: Mapping[str, FieldInfo], group: str, leaf: str) -> bool:
    return (declared := known.get(f"{group}.{leaf}")) is not None and has_text(declared)


def has_text(declared: FieldInfo) -> bool:
    """Say whether a setting is text, or has text among its values."""

    def is_text(kind: Any) -> bool:
        values = get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind)
        return kind is str or any(map(is_text, values))

    return is_text(declared.annotation)


def put(values: MutableMapping[Any, Any], settings: Mapping[str, Any]) -> None:
    """Put settings by their dotted names into nested mappings; what is no mapping is left for others to refuse."""
    for name, value in settings.items():
        *groups, leaf = name.split(".")
        target: Any = values
        for group in groups:
            target = target.setdefault(group, {}) if isinstance(target, MutableMapping) else None
        if isinstance(target, MutableMapping):
            target[leaf] = value


def read_texts(name: str, text: str) -> Any:
    """Read a list or mapping as `[a, "b, c"]` and `{3: d}`; whatever is in it stays the text that was typed.

    Text that is neither list nor mapping is given back.

    Raises:
        UserError: it does not end, has something after its end, or a mapping has a key twice.

    Example:
        >>> read_texts("data.columns", "[1.10, true, 'a, b']"), read_texts("forget.keys", "{3: 695e0514}")
        (['1.10', 'true', 'a, b'], {'3': '695e0514'})
    """
    if text[:1] not in ("[", "{"):
        return text
    try:
        value, end = _read(text, 0, "")
        if not text[end:].strip():
            return value
    except IndexError:
        pass
    except RepeatedError as key:
        raise RepeatedError(f"{name}={text} has {key} twice") from None
    raise UserError(f"{name}={text} cannot be read: a bracket or a quote is missing, or a comma")


def _read(text: str, at: int, ends: str) -> tuple[Any, int]:
    """Read the value that begins at a place; gives it and the place after it."""
    at = _after_blanks(text, at)
    if text[at] == "[":
        return _read_list(text, at + 1)
    if text[at] == "{":
        return _read_mapping(text, at + 1)
    if quoted := re.compile(rf"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')\s*(?=[{re.escape(ends)}])""").match(text, at):
        return re.sub(r"\\(['\"\\])", r"\1", quoted[1][1:-1]), quoted.end()
    bare = re.compile(f"[^{re.escape(ends)}]+").match(text, at)
    if not bare:
        raise IndexError(at)
    return bare[0].strip(), bare.end()


def _read_list(text: str, at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while text[at := _after_blanks(text, at)] != "]":
        value, at = _read(text, at, ",]")
        found.append(value)
        at = _after_blanks(text, at)
        at += text[at] == ","
    return found, at + 1


def _read_mapping(text: str, at: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while text[at := _after_blanks(text, at)] != "}":
        key, at = _read(text, at, ":}")
        if text[at] != ":":
            raise IndexError(at)
        if key in found:
            raise RepeatedError(key)
        found[key], at = _read(text, at + 1, ",}")
        at = _after_blanks(text, at)
        at += text[at] == ","
    return found, at + 1


def _after_blanks(text: str, at: int) -> int:
    while text[at].isspace():
        at += 1
    return at


def unquoted(text: str) -> str:
    """Give a text without the quotes around it, if there are any: a shell has left those to Flower's run config."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", text, re.DOTALL)
    return quoted[2] if quoted else text


def for_hydra(word: str, schema: type[BaseModel]) -> str:
    """Give a word as Hydra reads it, with `++` before keys that no default has: pydantic knows which there may be."""
    name, _, value = word.partition("=")
    mappings = tuple(known for known, declared in fields_of(schema) if is_mapping(declared))
    free = name.startswith(mappings) or (value.startswith("{") and name.isidentifier())
    return f"{'++' if free else ''}{word}"


def with_scale(words: list[str], folder: Path) -> list[str]:
    """Replace scale=auto, also where it is only implied, by laptop or full."""
    rest = [word for word in words if not word.startswith("scale=")]
    named = [word.removeprefix("scale=") for word in words if word not in rest]
    scale = named[-1] if named else "auto"
    if scale not in _SCALES:
        raise UserError(f"scale={scale} is not one of {', '.join(_SCALES)}")
    if not (folder / "scale").is_dir():
        return rest
    if scale == "auto":
        import torch

        scale = "full" if torch.cuda.is_available() else "laptop"
    return [f"scale={scale}", *rest]
