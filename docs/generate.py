"""Write the tables of the pages that the code knows better than any author: `python -m docs.generate`.

A page says where a table goes, and what it is of:

    <!-- generated: settings ssd -->
    <!-- end -->

The tables are kept in the pages, so that they can be read wherever Markdown is shown. `tests/test_docs.py` fails where
one of them is behind the code.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedunlearn.apps.scale import ScalingStudy
from fedunlearn.cli import default_of
from fedunlearn.config import Config
from fedunlearn.federation import tasks
from fedunlearn.federation.gate import Gate
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.portions import Portions
from fedunlearn.federation.requests import Requests
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.scores import Scorer
from fedunlearn.federation.strategy import Strategy, strategy_class, strategy_names
from fedunlearn.federation.tasks import ClientTask, tasks_of
from fedunlearn.schema import fields_of, range_of
from fedunlearn.study.federated.settings import FederatedSettings
from fedunlearn.study.pooled.settings import PaperSettings

FOLDER = Path(__file__).parent
MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
SCHEMAS: dict[str, type[BaseModel]] = {
    "run": Config, "paper": PaperSettings, "federated": FederatedSettings, "scale": ScalingStudy,
}  # fmt: skip
ROUNDS = tuple(
    (Rounds, name)
    for name in ("start", "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
)
"""Methods that ask clients in every round."""
FRAME = ((Requests, "serve"), (Gate, "__init__"), (Gate, "verdict"))
"""Methods that ask clients at every request."""
OBJECTS = {
    "federation": Federation, "_federation": Federation, "_scorer": Scorer, "requests": Requests, "_portions": Portions,
}  # fmt: skip
"""How the code calls what asks clients on somebody's behalf."""
ONLY_WITH = {"class_counts": "with `robust`", "selected_counts": "before a request about some of its images"}
"""Tasks that rounds ask for in one case alone."""


def main() -> None:
    """Renew the tables of all pages, and name the pages that have changed."""
    for path in pages():
        before = path.read_text()
        after = renewed(before)
        if after != before:
            path.write_text(after)
            print(path.relative_to(FOLDER.parent), file=sys.stderr)


def pages() -> list[Path]:
    """List the pages that have generated tables."""
    return [path for path in sorted(FOLDER.rglob("*.md")) if MARKED.search(path.read_text())]


def renewed(text: str) -> str:
    """Give a page with its tables as they are now."""
    return MARKED.sub(lambda found: f"{found[1]}{_generated(*found[2].split())}{found[3]}", text)


def _generated(kind: str, *names: str) -> str:
    kinds: dict[str, Callable[..., str]] = {"settings": settings, "shares": shares}
    return f"\n{kinds[kind](*names)}\n"


def settings(name: str, group: str = "") -> str:
    """List the settings of a command or a strategy, or one group of them; groups below are not listed."""
    schema: Any = SCHEMAS[name] if name in SCHEMAS else strategy_class(name).Settings
    prefix = "" if name in SCHEMAS else "unlearn."
    if group:
        schema, prefix = schema.model_fields[group].annotation, f"{group}."
    rows = [
        [f"`{prefix}{field}`", _default(declared), _range(declared), declared.description or ""]
        for field, declared in fields_of(schema)
        if field in schema.model_fields
    ]
    return table(["setting", "default", "range", "what it means"], rows) if rows else "It has no settings.\n"


def shares(name: str = "") -> str:
    """List what a client shares: with a request by one strategy, or with all of them and in rounds."""
    if name:
        asked = asked_by(strategy_class(name))
        found = [task for task in tasks_of(strategy_class(name)).values() if task.name in asked]
        if not found:
            return "The strategy asks no client for anything.\n"
        return table(["task", "what a client shares"], [[f"`{task.name}`", task.shares] for task in found])
    strategies = {name: strategy_class(name) for name in strategy_names()}
    known: dict[str, ClientTask] = {}
    for strategy in strategies.values():
        known |= tasks_of(strategy)
    always, framing = asked_in(ROUNDS), asked_in(FRAME)
    asked = {name: asked_by(strategy) for name, strategy in strategies.items()}
    rows = []
    for task in known.values():
        names = [f"`{name}`" for name in asked if task.name in asked[name]]
        names = ["all"] if task.name in framing else names
        in_rounds = ONLY_WITH.get(task.name, "yes") if task.name in always else "no"
        rows.append([f"`{task.name}`", task.shares, in_rounds, ", ".join(names) or "none"])
    return table(["task", "what a client shares", "in rounds", "at a request, with"], rows)


def asked_by(strategy: type[Strategy]) -> set[str]:
    """Name the client tasks that a strategy asks for when it forgets, as far as its code can tell."""
    return set(_asked(strategy, "forget", set()))


def asked_in(methods: Iterable[tuple[type, str]]) -> set[str]:
    """Name the client tasks that methods ask for, whatever the strategy."""
    seen: set[tuple[Any, str]] = set()
    return {task for owner, method in methods for task in _asked(owner, method, seen)}


def _asked(owner: Any, name: str, seen: set[tuple[Any, str]]) -> Iterator[str]:
    """Follow what a method or function uses: `tasks.NAME`, a class's own tasks, and methods that use them in turn."""
    function = _function(inspect.getattr_static(owner, name, None))
    if function is None or (owner, name) in seen:
        return
    seen.add((owner, name))
    module = inspect.getmodule(function)
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Name) and hasattr(module, node.id):
            used = getattr(module, node.id)
            if inspect.isfunction(used) and used.__module__ == function.__module__:
                yield from _asked(module, node.id, seen)
        elif isinstance(node, ast.Attribute):
            place = node.value
            called = place.id if isinstance(place, ast.Name) else getattr(place, "attr", "")
            target = {"tasks": tasks, "self": owner, **OBJECTS}.get(called)
            if isinstance(getattr(target, node.attr, None), ClientTask):
                yield getattr(target, node.attr).name
            elif inspect.isclass(target):
                yield from _asked(target, node.attr, seen)


def _function(member: Any) -> Any:
    member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _default(declared: Any) -> str:
    text = default_of(declared).replace('"', "")
    return {"": "none", "Infinity": "no end"}.get(text, f"`{text}`")


def _range(declared: Any) -> str:
    text = re.sub(r"\d{5,}", lambda digits: f"{int(digits[0]):,}", range_of(declared))
    return re.sub(r"(\S+)\.\.inf$", r"from \1 on", text)


if __name__ == "__main__":
    main()
