"""What a federated study leaves for people: REPORT.md, results.csv and pictures."""

import csv
import io
import statistics
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedunlearn.config import settings
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import duration
from fedunlearn.study.dag.settings import PIPELINES, Pipeline
from fedunlearn.study.federated.figures import frontier, story
from fedunlearn.study.federated.plan import Case, Plan
from fedunlearn.study.federated.settings import FederatedSettings, key_of
from fedunlearn.study.federated.tables import COSTS, MEASURES, RETRAINED, Results, Row, label, number, title
from fedunlearn.study.pooled.report import svg

CSV = ("case", "pipeline", "strategy", "forgotten", "after", "measure", "mean", "sd", "seeds", "retrained", "distance")
HIDDEN = ("data.root", "study.home")  # where files lie on a machine is nobody else's business

Table = tuple[Case, Pipeline, list[Row]]


def write(plan: Plan, root: Path) -> Path:
    """Write the study's `report/` from what has been measured so far; returns the path of `REPORT.md`."""
    folder, results = root / "report", Results(plan, root)
    pipelines: list[Pipeline] = [pipeline for pipeline in PIPELINES if pipeline in plan.settings.study.pipelines]
    tables = [table for case in distinct(plan.cases()) for p in pipelines if (table := rows_of(results, case, p))]
    write_atomically(folder / "results.csv", as_csv(results, tables).encode())
    captions = draw(results, tables, folder)
    tasks = plan.tasks()
    found = [task.result(root) for task in tasks if task.is_done(root)]
    words: dict[str, Any] = {
        "settings": plan.settings,
        "images": plan.images,
        "done": len(found),
        "tasks": len(tasks),
        "hours": duration(sum(result["seconds"] for result in found)),
        "machines": sorted({result["machine"] for result in found}),
        "everyone": [table for pipeline in pipelines for table in everyone(results, pipeline)],
        "tables": [table_of(results, *parts) for parts in tables],
        "pictures": captions,
        "values": list(shown_settings(plan.settings)),
    }
    template = files("fedunlearn.study.federated").joinpath("REPORT.md.jinja").read_text()
    page = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(**words)
    write_atomically(folder / "REPORT.md", page.encode())
    return folder / "REPORT.md"


def distinct(cases: list[Case]) -> list[Case]:
    """Give the cases, of several with the same requests the first."""
    by_name: dict[str, Case] = {}
    for case in cases:
        by_name.setdefault(case.name, case)
    return [*by_name.values()]


def rows_of(results: Results, case: Case, pipeline: Pipeline) -> Table | None:
    """Give the rows of a case, if any of them is a strategy's."""
    rows = results.rows(case, pipeline)
    return (case, pipeline, rows) if any(row.strategy != RETRAINED for row in rows) else None


def draw(results: Results, tables: list[Table], folder: Path) -> dict[str, str]:
    """Draw the first case, in its last pipeline; returns captions by file name."""
    captions = {}
    for case, pipeline, _ in [parts for parts in tables if parts[0] == tables[0][0]][-1:]:
        asked = title(case, pipeline)
        pictures = {
            "story": (f"Before and after a request, mean over seeds ({asked})", story(results, case, pipeline)),
            "frontier": (f"Distance to the retrained model against cost ({asked})", frontier(results, case, pipeline)),
        }
        for name, (caption, figure) in pictures.items():
            write_atomically(folder / f"{name}.svg", svg(figure))
            captions[name] = caption
    return captions


def shown_settings(chosen: FederatedSettings) -> Iterator[tuple[str, Any, str | None]]:
    """Give every setting as (name, value, description), those of the study's strategies among them."""
    for name, declared, value in settings(chosen):
        if name == "unlearn":
            for strategy in chosen.study.strategies:
                for own, field, setting in settings(chosen.of_strategy(strategy)):
                    yield f"unlearn.{key_of(strategy)}.{own}", setting, field.description
        elif name not in HIDDEN:
            yield name, value, declared.description


def table_of(results: Results, case: Case, pipeline: Pipeline, rows: list[Row]) -> dict[str, Any]:
    """Write a table as words: a line for every strategy and time, and one for what each strategy cost."""
    lines = []
    for row in rows:
        cells = [cell(row, measure) for measure in MEASURES]
        lines.append([", ".join(map(str, row.forgotten)), str(row.after), label(row.strategy), *cells])
    costs = []
    for strategy in results.plan.settings.study.strategies:
        found = results.costs(case, pipeline, strategy)
        if found:
            costs.append([label(strategy), *(spread(found[name], name) for name in COSTS)])
    return {
        "title": title(case, pipeline),
        "columns": ["forgotten", "rounds after", "strategy", *MEASURES.values()],
        "lines": lines,
        "cost_columns": ["strategy", *COSTS.values()],
        "costs": costs,
    }


def everyone(results: Results, pipeline: Pipeline) -> list[dict[str, Any]]:
    """Write two tables of the scenario in which every client is forgotten in turn; none where it is not studied."""
    cases = [case for case in results.plan.cases() if case.scenario == "everyone"]
    rows = {(row.strategy, row.after, row.forgotten[0]): row for case in cases for row in results.rows(case, pipeline)}
    asked = sorted({client for _, _, client in rows})
    if not asked:
        return []
    applied, strategies = accuracies_when_applied(results, pipeline, rows, asked)
    return [
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, distance to the retrained model",
            "columns": ["strategy", "rounds after", "clients", *MEASURES.values()],
            "lines": distances(results, rows, asked),
        },
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, accuracy on its images when applied",
            "columns": ["client", "images", "before", "held-out", "estimated", *map(label, strategies)],
            "lines": applied,
        },
    ]


def distances(results: Results, rows: dict[tuple[str, int, int], Row], asked: list[int]) -> list[list[str]]:
    """Write distances to the retrained model, over clients: a line for every strategy and time."""
    study, lines = results.plan.settings.study, []
    for strategy, after in product(study.strategies, study.after):
        found = [rows[strategy, after, client] for client in asked if (strategy, after, client) in rows]
        if found:
            cells = [over_clients(found, measure) for measure in MEASURES]
            lines.append([label(strategy), str(after), str(len(found)), *cells])
    return lines


def accuracies_when_applied(
    results: Results, pipeline: Pipeline, rows: dict[tuple[str, int, int], Row], asked: list[int]
) -> tuple[list[list[str]], list[str]]:
    """Write each client's accuracy before and after, beside the estimate: a line a client; and which strategies."""
    study = results.plan.settings.study
    cases = [case for case in results.plan.cases() if case.scenario == "everyone"]
    strategies = [*(s for s in study.strategies if any((s, 0, c) in rows for c in asked)), RETRAINED]
    lines = []
    for client in asked:
        case = next(c for c in cases if c.forgotten(0) == (client,))
        base = results.before(case, pipeline)
        known = [[row[f"{kind}_{client}"] for row in base] for kind in ("client", "held_out")]
        known.append(results.estimated(case, pipeline))
        values = [rows[s, 0, client].values["forget"] if (s, 0, client) in rows else [] for s in strategies]
        cells = [spread(numbers, "forget") for numbers in (*known, *values)]
        lines.append([str(client), str(results.sizes[client]), *cells])
    return lines, strategies


def over_clients(rows: list[Row], measure: str) -> str:
    """Write the mean distance to the retrained model ± deviation over clients; the largest and whose it is."""
    found = {row.forgotten[0]: row.distance(measure) for row in rows if not isnan(row.distance(measure))}
    if not found:
        return "–"
    worst = max(found, key=found.__getitem__)
    return f"{spread([*found.values()], measure)}; client {worst}: {number(found[worst], measure)}"


def cell(row: Row, measure: str) -> str:
    """Write mean ± standard deviation over seeds, and in parentheses the mean distance to the retrained model."""
    text = spread(row.values.get(measure, []), measure)
    distance = row.distance(measure)
    return text if isnan(distance) else f"{text} ({number(distance, measure)})"


def spread(values: list[float], measure: str) -> str:
    """Write mean ± standard deviation."""
    if not values:
        return "–"
    text = number(statistics.fmean(values), measure)
    return f"{text} ± {number(statistics.stdev(values), measure)}" if len(values) > 1 else text


def as_csv(results: Results, tables: list[Table]) -> str:
    """Write one line a number; a cost's is after 0 rounds, and has no retrained model's beside it."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV)
    for case, pipeline, rows in tables:
        for row in rows:
            who = "+".join(map(str, row.forgotten))
            for measure, values in row.values.items():
                retrained = statistics.fmean(row.retrained[measure]) if row.retrained.get(measure) else nan
                numbers = [row.mean(measure), row.sd(measure), len(values), retrained, row.distance(measure)]
                writer.writerow([case.name, pipeline, row.strategy, who, row.after, measure, *map(plain, numbers)])
        for strategy in results.plan.settings.study.strategies:
            for name, values in results.costs(case, pipeline, strategy).items():
                sd = statistics.stdev(values) if len(values) > 1 else nan
                numbers = [statistics.fmean(values), sd, len(values), nan, nan]
                who = "+".join(map(str, case.forgotten(0)))
                writer.writerow([case.name, pipeline, strategy, who, 0, name, *map(plain, numbers)])
    return buffer.getvalue()


def plain(value: float) -> str:
    """Write six digits; nothing for nan."""
    return "" if isnan(value) else f"{value:.6g}"
