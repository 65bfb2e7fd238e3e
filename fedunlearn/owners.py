"""Owners in settings: who they are, and the names that somebody typed where settings have numbers of clients."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError, printable
from fedunlearn.naming import name_of, number_of
from fedunlearn.schema import check_text
from fedunlearn.schema import name_of as setting_of
from fedunlearn.words import read_texts, unquoted

OWNED = ("folders", "file", "column", "nodes")
"""Partitions in which the images' owners are known."""

ON_NODES = "nodes"
"""The one in which every machine has its own clients' images, and nobody has them all."""

NAMING = ("forget.schedule", "forget.keys", "readmit", "partition.names", "partition.keys")
"""Settings in which clients may be named."""


def named_settings(words: Iterable[str]) -> dict[str, Any]:
    """Read the settings that may name clients, by their names; every value stays the text that was typed.

    Raises:
        UserError: brackets or quotes are not closed.

    Example:
        >>> named_settings(["forget.schedule={6:[3, 1.10]}", "readmit=['a, b']", "rounds=3"])
        {'forget.schedule': {'6': ['3', '1.10']}, 'readmit': ['a, b']}
    """
    pairs = ((setting_of(word), unquoted(word.partition("=")[2])) for word in words)
    return {name: read_texts(name, value) for name, value in pairs if name in NAMING}


def settled(
    values: dict[str, Any], asked: Collection[str], runs: Path, clients_of: Callable[[Mapping[str, Any]], list[str]]
) -> None:
    """Fill in, in place, the owners' names and their number, and turn names of clients into numbers.

    Args:
        values: of all settings, as they were composed.
        asked: names of settings that somebody typed.
        runs: the folder of runs: one that exists keeps its clients.
        clients_of: finds the names of the owners of the images that settings are about.

    Raises:
        UserError: no client has such a name, or `clients` is not the number of owners.
    """
    split, forget = values["partition"], values["forget"]
    if not all(isinstance(part, dict) for part in (split, forget)):
        return  # which is refused elsewhere
    if split.get("file"):
        if split["kind"] not in ("dirichlet", "file"):
            raise UserError(f"partition.file says who owns an image, and partition.kind={split['kind']} too: give one")
        split["kind"] = "file"
    elif split.get("kind") == "file":
        raise UserError("partition.kind=file reads a table of paths and clients: say partition.file=clients.csv")
    if split.get("names") and split.get("kind") not in OWNED:
        raise UserError("partition.names is for owners: partition.kind=folders, file, column or nodes")
    names = _kept(runs, values.get("run"), values.get("fork"))
    if not names and split.get("kind") in OWNED:
        wanted = split.get("names") or []
        names = [str(name) for name in wanted] if split["kind"] == ON_NODES else _chosen(wanted, clients_of(values))
        check_names(names)
        if "clients" in asked and values["clients"] != len(names):
            raise UserError(f"clients={values['clients']}: the images have {_counted(names)}; leave `clients` out")
        split["names"] = names
    if names and "clients" not in asked:
        values["clients"] = len(names)
    if isinstance(schedule := forget.get("schedule"), dict):
        forget["schedule"] = {round_: _numbers(clients, names) for round_, clients in schedule.items()}
    for group in (forget, split):
        if isinstance(keys := group.get("keys"), dict):
            group["keys"] = _by_number(keys, names)
    values["readmit"] = _numbers(values.get("readmit"), names)


def _by_number(keys: dict[Any, Any], names: Sequence[str]) -> dict[Any, Any]:
    """Give keys by the clients' numbers.

    Raises:
        UserError: a client is named twice.
    """
    found: dict[Any, Any] = {}
    for client, key in keys.items():
        if (number := _number(client, names)) in found:
            raise UserError(f"client {name_of(number, names)} has two keys")
        found[number] = key
    return found


def check_names(names: Sequence[str]) -> None:
    """Raise UserError for owners that a ledger cannot name, for one alone, and for a name that is there twice."""
    for name in names:
        check_text(name)
        if not name.strip():
            raise UserError("a client has no name: give its folder, or its line in the table, one")
    if repeated := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UserError(f"partition.names has {printable(repeated[0])} twice")
    if len(names) < 2:
        raise UserError(f"the images have {_counted(names)}: a federation has at least 2 clients")


def _chosen(wanted: Sequence[Any], known: Sequence[str]) -> list[str]:
    """Give the clients that take part: all of them, or those that were named."""
    numbers = [number_of(str(name), known) for name in wanted]
    if beyond := [number for number in numbers if not 0 <= number < len(known)]:
        raise UserError(f"partition.names: client {beyond[0]} is not in 0..{len(known) - 1}")
    return [known[number] for number in numbers] or [*known]


def _counted(names: Sequence[str]) -> str:
    first = ", ".join(name_of(client, names) for client in range(min(len(names), 10)))
    return f"{len(names)} owner{'s' if len(names) != 1 else ''} ({first}{', ...' if len(names) > 10 else ''})"


def _kept(runs: Path, *folders: Any) -> list[str]:
    """Give the clients' names in the first of some runs that exists and has names; else none."""
    for folder in filter(None, folders):
        try:
            return list(json.loads((runs / folder / "run.json").read_text())["config"]["partition"]["names"])
        except (OSError, ValueError, KeyError, TypeError):  # whoever opens the run says what is wrong with it
            continue
    return []


def _numbers(clients: Any, names: Sequence[str]) -> Any:
    return [_number(client, names) for client in clients] if isinstance(clients, list) else clients


def _number(client: Any, names: Sequence[str]) -> Any:
    """Give a client's number; what was no text and no number is left to whoever checks types.

    A number in a file of settings is what it is among words: a name, where clients are called by numbers.
    """
    client = str(client) if names and type(client) is int else client
    is_text = isinstance(client, str) and (names or re.fullmatch(r"-?\d{1,9}", client))
    return number_of(client, names) if is_text else client
