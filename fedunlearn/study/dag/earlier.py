"""Results that an earlier version has left: they count where its settings, which were fewer, say the same."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedunlearn.errors import UserError
from fedunlearn.study.dag.tasks import FORMAT, Task, read

FIRST = 3  # format of results that do not say which they have


def adopt(tasks: Iterable[Task], root: Path) -> list[Task]:
    """Give tasks the results that an earlier version has made of them, as links; returns which.

    A version that adds a setting changes the keys of tasks. Whatever was lacking must have its default now, and
    all else must be as it was.
    """
    adopted = []
    for task in tasks:
        folder = task.folder(root)
        if folder.is_symlink() and not folder.exists():  # somebody has deleted what it led to
            folder.unlink(missing_ok=True)
        if not folder.exists() and (found := earlier(task, root)):
            with suppress(FileExistsError):  # another process was faster
                folder.symlink_to(found.name)
            adopted.append(task)
    return adopted


def earlier(task: Task, root: Path) -> Path | None:
    """Give the folder in which an earlier version has made a task with the same settings; None where there is none."""
    for file in sorted(task.folder(root).parent.glob(f"{task.prefix}-*/result.json")):
        with suppress(UserError):  # a damaged one is none
            stored = read(file)
            if stored.get("format", FIRST) == FORMAT and agree(stored["settings"], *plain(task)):
                return file.parent
    return None


def plain(task: Task) -> tuple[Any, Any]:
    """Give a task's settings and their defaults as they look when they have been stored."""
    settings, defaults = json.loads(json.dumps([task.settings, task.defaults]))
    return settings, defaults


def agree(stored: Any, wanted: Any, defaults: Any) -> bool:
    """Say whether settings mean the same as those that an earlier version has stored.

    Args:
        stored: the earlier version's.
        wanted: today's.
        defaults: of today's settings. A name that is not stored must be in them, and have this value.

    Example:
        >>> agree({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.01, "momentum": 0.9})
        True
    """
    if not isinstance(stored, Mapping) or not isinstance(wanted, Mapping):
        return stored == wanted
    usual = defaults if isinstance(defaults, Mapping) else {}
    return stored.keys() <= wanted.keys() and all(
        agree(stored[name], value, usual.get(name)) if name in stored else name in usual and value == usual[name]
        for name, value in wanted.items()
    )
