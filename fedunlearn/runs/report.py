"""What a run leaves for people: a summary table and one self-contained HTML page."""

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedunlearn.config import Config, values_of
from fedunlearn.errors import UserError
from fedunlearn.naming import named
from fedunlearn.runs import uncertainty
from fedunlearn.runs.figures import MOST_DRAWN, Mark, accuracy_figure, curves, split_figure
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.home import OPERATIONAL, changed
from fedunlearn.runs.ledger import FAILED, FORGOTTEN, RECEIPT, Request, State
from fedunlearn.runs.page import embedded, encoded, rendered
from fedunlearn.runs.purge import known_class_counts
from fedunlearn.runs.run import Run
from fedunlearn.runs.timeline import readable, timeline, what_follows
from fedunlearn.runs.uncertainty import fraction
from fedunlearn.runs.verdicts import Moment, Verdict, beside_retrained, latest, moments, seconds, verdicts
from fedunlearn.schema import fields_of

HIDDEN = ("run", "home", "data.root")  # the first is the title; where files lie on a machine is nobody else's business
MAY_DIFFER = (
    "run",
    "home",
    "fork",
    "data.root",
    "seed",
    "strategy",
    "unlearn",
    "forget.",
    "evaluate_every",
    "readmit",
    *OPERATIONAL,
)
"""How names of settings begin in which a run and the one that it is compared with may differ."""


def summary(run: Run, class_counts: np.ndarray | None = None) -> str:
    """Write one table: every group's accuracies before and after each request, and at the end, ± a standard error.

    Args:
        class_counts: training images of every client by class, [C, K]; the gap has its standard error only with them.
    """
    class_counts = known_class_counts(run, class_counts)
    table = Table(title=f"run {run.name}", title_justify="left")
    columns = ("when", "who", "images", "class accuracy", "memorisation gap", "client-ID accuracy")
    for column in columns:
        words = column in columns[:2]
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    for when, rows in groupby(score_rows(run), key=itemgetter(0)):
        table.add_section()
        for number, (_, who, scores, test, client) in enumerate(rows):
            own, gap = str(fraction(scores["class"], scores["examples"])), _gap(client, scores, test, class_counts)
            first = "" if number else escape(when)
            table.add_row(first, escape(who), str(scores["examples"]), own, gap, _id(who, scores))
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue().rstrip()


def write(
    run: Run,
    class_counts: np.ndarray | None,
    class_names: list[str],
    *,
    label: str = "",
    own_settings: type[BaseModel] | None = None,
    retrained: Sequence[Run] = (),
) -> Path:
    """Write `report/index.html`; returns its path.

    Args:
        class_counts: training images of every client by class, [C, K], where an auditor knows them.
        class_names: K names.
        label: what people call the strategy; by default the name that the settings have.
        own_settings: the strategy's `Settings`, for what they mean and which differ from their defaults.
        retrained: runs in which the forgotten clients never took part, to be compared with; the first is drawn.

    Raises:
        UserError: they did take part in one of them, or it was trained on other data.
    """
    class_counts = known_class_counts(run, class_counts)
    config, requests, rows, events = run.config, run.ledger.requests(), run.metrics(), run.ledger.events()
    label, current = label or config.strategy, run.ledger.current()
    names = run.names()
    found = verdicts(requests, rows, label=label, class_counts=class_counts, names=names)
    levels = {verdict.request: verdict for verdict in found}
    changed, unchanged = shown_settings(config, own_settings)
    counted = _count_forgotten(rows)
    now = latest(rows)
    page = rendered(
        "fedunlearn.runs",
        "report.html.jinja",
        run=run.name,
        config=config,
        label=label,
        about=run.about(),
        created=readable(run.about()["created"]),
        trained=current.round if current else 0,
        verdicts=[*found, *(comparison(run, retrained) if retrained else [])],
        has_retrained=bool(retrained),
        cards=[card(run, request, levels[request.id], rows, events, class_counts) for request in requests],
        now=now and score_table([now], [], class_counts),
        has_forgotten=counted > 0,
        more_forgotten=f" Of {counted} forgotten clients the first {MOST_DRAWN} are drawn." * (counted > MOST_DRAWN),
        has_curves=bool(curves(rows, "class")),
        events=len(events),
        head=run.ledger.head().root if events else "",
        current=current,
        changed=changed,
        unchanged=unchanged,
        split=None if class_counts is None else embedded(split_figure(class_counts, class_names, names)),
        accuracy=embedded(
            accuracy_figure(rows, marks(requests, events), retrained[0].metrics() if retrained else None, names)
        ),
    )
    path = run.folder / "report" / "index.html"
    write_atomically(path, encoded(page))
    return path


def comparison(run: Run, retrained: Sequence[Run]) -> list[Verdict]:
    """Compare what is left of forgotten clients with retrained models, a verdict a request that was applied.

    Raises:
        UserError: another run is no retrained model: the clients took part, or it has other data or settings.
    """
    rows, others = run.metrics(), [rows_of_retrained(run, other) for other in retrained]
    applied = [request for request in run.ledger.requests() if request.state in FORGOTTEN]
    found = (beside_retrained(request, rows, *others, names=run.names()) for request in applied)
    return [verdict for verdict in found if verdict]


def rows_of_retrained(run: Run, retrained: Run) -> list[dict[str, Any]]:
    """Give the metrics of a retrained model, with the numbers that portions of clients have in the run.

    Raises:
        UserError: it is none: the clients took part, or it has other data or settings.
    """
    if others := changed(run, retrained.about()["data"]):
        raise UserError(f"run {retrained.name} was trained on other data than run {run.name} ({others})")
    ours, theirs = (values_of(each.config) for each in (run, retrained))
    for name, value in ours.items():
        if not name.startswith(MAY_DIFFER) and theirs.get(name) != value:
            raise UserError(f"run {retrained.name} has {name}={theirs.get(name)}, run {run.name} has {value}")
    applied, others = (
        [request for request in each.ledger.requests() if request.state in FORGOTTEN] for each in (run, retrained)
    )
    mine, their_own = (
        {meant: number for request in each for number, meant in request.meant.items()} for each in (applied, others)
    )
    mine |= {(portion.client, portion.selection): n for n, portion in run.ledger.portions(FORGOTTEN).items()}
    never = {meant for request in others if request.detail["round"] == 0 for meant in request.meant.values()}
    if took_part := sorted(mine[meant] for meant in mine.keys() - never):
        raise UserError(f"run {retrained.name} is no retrained model: {run.named(took_part[:1])} took part in it")
    if further := sorted(their_own[meant] for meant in their_own.keys() - mine.keys()):
        raise UserError(f"run {retrained.name} is no retrained model: it is without {retrained.named(further[:1])} too")
    numbers = {str(number): str(mine[meant]) for meant, number in their_own.items()}
    return [renumbered(row, numbers) for row in retrained.metrics()]


def renumbered(row: dict[str, Any], numbers: Mapping[str, str]) -> dict[str, Any]:
    """Give a row of metrics with forgotten clients, and portions of clients, under other numbers."""
    forgotten = {numbers.get(number, number): scores for number, scores in row.get("forgotten", {}).items()}
    return row | {"forgotten": forgotten}


def card(
    run: Run,
    request: Request,
    verdict: Verdict,
    rows: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    class_counts: np.ndarray | None,
) -> dict[str, Any]:
    """Gather what the page says of one request."""
    measured, detail, current = moments(request, rows), request.detail, run.ledger.current()
    costs = [{"name": name, **cost} for name, cost in detail.get("costs", {}).items()]
    commit = _commit_of(request, events)
    is_now = commit is not None and current is not None and current.sha256 == commit["sha256"]
    return {
        "request": request,
        "who": run.named(request.clients),
        "level": verdict.level,
        "is_applied": request.state in FORGOTTEN,
        "follows": what_follows(request, run.folder, run.ledger.covering(request.clients)),
        "timeline": timeline(request, events),
        "cost": _cost_line(detail, costs),
        "tasks": costs,
        "checkpoint": commit and commit["checkpoint"],
        "sha256": commit and commit["sha256"],
        "fate": "" if is_now else " (replaced since by those of later rounds)",
        "said": _said_by_strategy(detail),
        "scores": measured and score_table(measured, request.clients, class_counts, run.names()),
    }


def marks(requests: Iterable[Request], events: Sequence[dict[str, Any]]) -> list[Mark]:
    """Say after which round each request was applied, or failed; open ones that wait have no mark."""
    found = []
    for request in requests:
        if request.state in FORGOTTEN:
            found.append(Mark(request.detail["round"], request.clients))
        elif request.state in FAILED:
            last = max(place for place, event in enumerate(events) if event.get("request") == request.id)
            rounds = [event["round"] for event in events[:last] if "checkpoint" in event]
            found.append(Mark(rounds[-1] if rounds else 0, request.clients, failed=True))
    return found


def score_table(
    measured: Sequence[Moment], clients: Sequence[int], class_counts: np.ndarray | None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Write accuracies as words: a column a moment; for each group of images some lines."""
    groups = []
    for client in map(str, clients):
        each = [(moment.scores["forgotten"].get(client), moment.scores["test"]) for moment in measured]
        if not any(scores for scores, _ in each):
            continue
        lines = [("class accuracy", [_accuracy(scores) for scores, _ in each])]
        if any("held_out" in (scores or {}) for scores, _ in each):
            lines.append(("held-out images of its class counts", [_held_out(client, *s, class_counts) for s in each]))
            lines.append(("memorisation gap", [_gap(client, *s, class_counts) for s in each]))
        lines.append(("client-ID accuracy", [_accuracy(scores, "client_id") for scores, _ in each]))
        examples = next(scores["examples"] for scores, _ in each if scores)
        groups.append({"who": named([int(client)], names), "examples": examples, "what": "images", "lines": lines})
    for who, key, what in (("retain clients", "retain", "training images"), ("test", "test", "held-out images")):
        each = [moment.scores[key] for moment in measured]
        lines = [("class accuracy", [_accuracy(scores) for scores in each])]
        if key == "retain":
            lines.append(("client-ID accuracy", [_accuracy(scores, "client_id") for scores in each]))
        groups.append({"who": who, "examples": each[-1]["examples"], "what": what, "lines": lines})
    return {"moments": [moment.when for moment in measured], "groups": groups}


def shown_settings(
    config: Config, own_settings: type[BaseModel] | None = None
) -> tuple[list[tuple[str, Any, str]], list[tuple[str, Any, str]]]:
    """Give the settings that differ from the defaults, and all others, as (name, value, meaning)."""
    declared = dict(fields_of(Config))
    declared |= {f"unlearn.{name}": field for name, field in fields_of(own_settings)} if own_settings else {}
    changed, unchanged = [], []
    for name, value in values_of(config).items():
        if name in HIDDEN:
            continue
        field = declared.get(name)
        row = (name, value, (field.description or "") if field else "")
        is_unknown = field is None and name.startswith("unlearn.")  # of these nobody can say
        same = is_unknown or (field is not None and value == field.get_default(call_default_factory=True))
        (unchanged if same else changed).append(row)
    return changed, unchanged


def score_rows(run: Run) -> list[tuple[str, str, dict[str, Any], dict[str, Any], str]]:
    """Give (when, who, scores, scores on test images, a client's number) of every request and the last evaluation."""
    points, evaluated = [], None
    for row in run.metrics():
        if row["kind"] == "forget":
            asked = run.named(row["clients"])
            points += [(f"before forgetting {asked}", row["before"]), (f"after forgetting {asked}", row["after"])]
            evaluated = None
        elif "test" in row:
            evaluated = row
    if evaluated:
        points.append((f"after round {evaluated['round']}", evaluated))
    rows = []
    for when, scores in points:
        test = scores["test"]
        rows += [(when, run.named([int(client)]), s, test, client) for client, s in scores["forgotten"].items()]
        rows += [(when, "retain clients", scores["retain"], test, ""), (when, "test", test, test, "")]
    return rows


def _count_forgotten(rows: Sequence[dict[str, Any]]) -> int:
    return len({c for row in rows if row["kind"] == "forget" and row["after"]["forgotten"] for c in row["clients"]})


def _accuracy(scores: dict[str, Any] | None, measure: str = "class") -> str:
    """Write an accuracy with its standard error; a client ID that a cut-off output never names is exactly 0."""
    if not scores:
        return ""
    if measure == "client_id" and not scores[measure]:
        return "0"
    return str(fraction(scores[measure], scores["examples"]))


def _id(who: str, scores: dict[str, Any]) -> str:
    return "" if who == "test" else _accuracy(scores, "client_id")


def _held_out(client: str, scores: dict[str, Any] | None, test: dict[str, Any], counts: np.ndarray | None) -> str:
    if not scores or "held_out" not in scores:
        return ""
    own = None if counts is None else counts[int(client)]
    return str(uncertainty.held_out(scores["held_out"], test["examples"], own))


def _gap(client: str, scores: dict[str, Any] | None, test: dict[str, Any], counts: np.ndarray | None) -> str:
    """Write a client's memorisation gap, with its standard error where the class counts are known."""
    if not scores or "held_out" not in scores:
        return ""
    gap = uncertainty.memorisation_gap({client: scores}, test["examples"], counts)
    if gap is None:
        return ""
    return f"{gap.value:+.3f}".replace("-", "−") if counts is None else gap.text(signed=True)


def _cost_line(detail: dict[str, Any], costs: Sequence[dict[str, Any]]) -> str:
    if "seconds" not in detail:
        return ""
    megabytes, work = (sum(cost[name] for cost in costs) for name in ("bytes", "work"))
    kept = detail.get("stored_bytes", 0) / 1e6
    return (
        f"{seconds(detail['seconds'])} until it was applied. {megabytes / 1e6:,.1f} MB in messages, {work:,.1f} s of "
        f"the clients' processors. For requests the server had kept {kept:,.1f} MB."
    )


def _commit_of(request: Request, events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the entry of the ledger with which a request's new model became the run's."""
    last = None
    for event in events:
        if "checkpoint" in event:
            last = event
        elif event.get("request") == request.id and event.get("state") == State.APPLIED:
            return last
    return None


def _said_by_strategy(detail: dict[str, Any]) -> list[tuple[str, str]]:
    """List the numbers and words that a strategy put into the receipt by itself."""
    return [
        (name, f"{value:.4g}" if isinstance(value, float) else str(value))
        for name, value in detail.items()
        if name not in RECEIPT and isinstance(value, int | float | str)
    ]
