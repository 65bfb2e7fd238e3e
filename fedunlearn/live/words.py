"""Settings as Python has them, as the words that a command takes."""

import re
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

from fedunlearn.config import Config
from fedunlearn.errors import UserError
from fedunlearn.naming import listed
from fedunlearn.schema import nearest_of, setting_names


def words_of(settings: Mapping[str, Any], *, options: tuple[str, ...] = ()) -> list[str]:
    """Write settings as words `name=value`.

    Args:
        settings: by name; those of a group are a mapping of their own, or have dotted names. What is None is left out;
            a setting of a strategy may be None.
        options: what else there is to name, for a hint at what was meant.

    Raises:
        UserError: a name is no setting; it has the nearest that is one.

    Example:
        >>> words_of({"rounds": 8, "model": {"width": 8}, "forget.schedule": {6: [3]}})
        ['rounds=8', 'model.width=8', 'forget.schedule={6:[3]}']
    """
    known = setting_names(Config)
    pairs = [pair for name, value in settings.items() for pair in _flat(name, value)]
    for name, _ in pairs:
        if name not in known and not name.startswith("unlearn."):
            raise UserError(f"{name} is no setting{nearest_of(name, [*known, *options])}")
    given = [(name, value) for name, value in pairs if value is not None or name.startswith("unlearn.")]
    return [f"{name}={_text(value, name.startswith('unlearn.'), _escaped(name))}" for name, value in given]


def options_for(about: Mapping[str, Any]) -> list[str]:
    """Write what a request is about as options of a command.

    Example:
        >>> options_for({"client": [3, 5], "class": "frog", "patient": ()})
        ['--client=3', '--client=5', '--class=frog']
    """
    return [f"--{name}={value}" for name, values in about.items() for value in listed(values)]


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a group one by one; a mapping with free keys, such as forget.schedule, stays whole."""
    if isinstance(value, Mapping) and (name == "unlearn" or name in _groups()):
        for key, below in value.items():
            yield from _flat(f"{name}.{key}", below)
    else:
        yield name, value


def _groups() -> set[str]:
    return {name.rpartition(".")[0] for name in setting_names(Config) if "." in name}


def _escaped(name: str) -> str:
    """Give the signs that a backslash is put before in a setting's texts; Hydra leaves others alone than we do."""
    return "'" if name.startswith(("unlearn.", "model.options")) else r"'\\"


def _text(value: Any, quoted: bool, escaped: str) -> str:
    """Write a value in Hydra's grammar; a text that Hydra could take for something else is quoted."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(below, True, escaped)}" for key, below in value.items()) + "}"
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(_text(each, True, escaped) for each in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, str | PathLike) and quoted:
        return "'" + re.sub(f"([{escaped}])", r"\\\1", fspath(value)) + "'"
    return str(value)
