"""What a schema of settings says of itself, and mistakes in settings in one line."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fedunlearn.errors import UserError

KEY_ID = r"[0-9a-f]{64}|0[23]([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{132})"
"""Public keys in hexadecimal digits: of Ed25519, or compressed points of P-256, P-384 and P-521."""

S = TypeVar("S", bound=BaseModel)


def fields_of(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of a schema, as (dotted name, field)."""
    for name, declared in schema.model_fields.items():
        if is_group(declared):
            yield from fields_of(declared.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", declared


def setting_names(schema: type[BaseModel]) -> list[str]:
    """Every setting and group of a schema that a word can name."""
    names = [name for name, _ in fields_of(schema)]
    return [*names, *dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name)]


def is_group(declared: FieldInfo) -> bool:
    """Whether a field holds settings of its own."""
    return isinstance(declared.annotation, type) and issubclass(declared.annotation, BaseModel)


def is_mapping(declared: FieldInfo) -> bool:
    """Whether a field is a mapping with free keys."""
    return getattr(declared.annotation, "__origin__", None) is dict


def range_of(declared: FieldInfo) -> str:
    """`0..100`, `one of iid, class`, or nothing where the type alone restricts the value."""
    options = getattr(declared.annotation, "__args__", ()) if _is_literal(declared) else ()
    if options:
        return f"one of {', '.join(map(str, options))}"
    bounds = {
        kind: getattr(m, kind) for m in declared.metadata for kind in ("ge", "gt", "le", "lt") if hasattr(m, kind)
    }
    if not bounds:
        return ""
    low = bounds.get("ge", bounds.get("gt", "-inf"))
    return f"{low}..{bounds.get('le', bounds.get('lt', 'inf'))}"


def _is_literal(declared: FieldInfo) -> bool:
    return getattr(declared.annotation, "__origin__", None) is Literal


def name_of(word: str) -> str:
    """The setting that a word such as `++unlearn.alpha=2` names."""
    return word.lstrip("+~").split("=")[0]


def check_names(words: Iterable[str], schema: type[BaseModel]) -> None:
    """Raise UserError for the first word that names no setting of `schema`, with the nearest that is.

    Settings below a free mapping, such as `unlearn.`, are checked by whoever knows them.
    """
    known = setting_names(schema)
    mappings = {name: declared for name, declared in fields_of(schema) if is_mapping(declared)}
    free = tuple(f"{name}." for name in mappings)
    for word in words:
        name = name_of(word)
        if "=" not in word:
            raise UserError(f"{word!r} is no setting of the form name=value")
        if name not in known and not name.startswith(free):
            raise UserError(f"{name} is no setting{nearest_of(name, known)}")
        if name in mappings:
            _check_mapping(name, word.partition("=")[2], mappings[name])


def _check_mapping(name: str, text: str, declared: FieldInfo) -> None:
    """Raise UserError where the text is no mapping."""
    if not re.fullmatch(r"(['\"]?)\s*\{.*\}\s*\1", text, re.DOTALL):
        raise UserError(f"{name}={text} is not of this form: {declared.description}")


def nearest_of(name: str, known: Iterable[str]) -> str:
    """`: did you mean rounds?`, or where to look if nothing is near."""
    known = list(known)
    leaves = {option.rpartition(".")[2]: option for option in known}
    close = difflib.get_close_matches(name, known, 1, 0.6)
    close = close or [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, 1, 0.8)]
    return f": did you mean {close[0]}?" if close else " (`fedunlearn config` lists all of them)"


def check_text(text: str) -> None:
    """Raise UserError where a text has something that is no character, or a control character."""
    for character in text:
        if unicodedata.category(character) == "Cs":
            raise UserError(f"{text!r} is no text: {character!r} is no character in UTF-8")
        if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
            raise UserError(f"{text!r} has the control character {character!r}: leave it out")


def validated(schema: type[S], values: Any, *, prefix: str = "") -> S:
    """The settings, or a UserError of one line for the first value that is wrong."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(in_one_line(error, schema, prefix)) from None


def in_one_line(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> str:
    """Say the first thing that is wrong: the setting, its value, and what it may be.

    Args:
        prefix: of the names of settings, as `unlearn.`.
    """
    first = error.errors()[0]
    place = [part for part in first["loc"] if isinstance(part, str)]
    name, known = prefix + ".".join(map(str, first["loc"])), dict(fields_of(schema))
    if first["type"] == "extra_forbidden":
        return f"{name} is no setting{nearest_of(name, [prefix + option for option in known])}"
    for setting, declared in known.items():
        if is_mapping(declared) and f"{'.'.join(place)}.".startswith(f"{setting}."):
            return f"{prefix}{setting} is not of this form: {declared.description}"
    declared = known.get(".".join(place))
    limits = range_of(declared) if declared else ""
    if first["type"] == "literal_error":
        return f"{name}={first['input']} is not {limits or first['msg']}"
    if first["type"] in ("greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"):
        return f"{name}={first['input']} is not in {limits}"
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "string": "text"}
    kind = kinds.get(first["type"].split("_")[0])
    if kind:
        hint = ": in quotes within quotes it stays as it is typed" if kind == "text" else ""
        return f"{name}={first['input']} is not {kind}{f' in {limits}' if limits else ''}{hint}"
    return f"{name}={first['input']}: {first['msg']}"
