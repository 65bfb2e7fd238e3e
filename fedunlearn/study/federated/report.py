"""What a federated study leaves for people: REPORT.md, results.csv and pictures."""

import csv
import io
import statistics
from importlib.resources import files
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fedunlearn.config import settings
from fedunlearn.runs.checkpoint import write_atomically
from fedunlearn.runs.report import duration
from fedunlearn.study.dag.steps import log
from fedunlearn.study.federated.figures import frontier, story
from fedunlearn.study.federated.plan import Case, Plan
from fedunlearn.study.federated.tables import COSTS, MEASURES, Results, Row, label, number, title
from fedunlearn.study.pooled.report import svg
from fedunlearn.study.pooled.settings import PIPELINES

CSV = ("case", "pipeline", "strategy", "forgotten", "after", "measure", "mean", "sd", "seeds", "gold", "distance")


def write(plan: Plan, root: Path) -> Path:
    """Write the study's `report/` from what has been measured so far; returns the path of `REPORT.md`."""
    log("writing the report")
    folder, results = root / "report", Results(plan, root)
    pipelines = list(dict.fromkeys(pipeline for pipeline, _ in plan.each()))
    cases = plan.cases()
    cases = [case for place, case in enumerate(cases) if case.name not in {earlier.name for earlier in cases[:place]}]
    tables = [(case, p, results.rows(case, p)) for case in cases for p in pipelines]
    tables = [(case, pipeline, rows) for case, pipeline, rows in tables if any(r.strategy != "gold" for r in rows)]
    write_atomically(folder / "results.csv", as_csv(results, tables).encode())
    pictures = {}
    for case, pipeline, _ in [parts for parts in tables if parts[0] == tables[0][0]][-1:]:
        asked = title(case, pipeline)
        pictures = {
            "story": (f"Before and after a request, mean over seeds ({asked})", story(results, case, pipeline)),
            "frontier": (f"Distance to gold against cost ({asked})", frontier(results, case, pipeline)),
        }
    for name, (_, figure) in pictures.items():
        write_atomically(folder / f"{name}.svg", svg(figure))
    done = [step for step in plan.everything() if step.is_done(root)]
    found = [step.result(root) for step in done]
    words: dict[str, Any] = {
        "settings": plan.settings,
        "images": plan.images,
        "done": len(done),
        "steps": len(plan.everything()),
        "hours": duration(sum(result["seconds"] for result in found)),
        "machines": sorted({result["machine"] for result in found}),
        "everyone": [found for pipeline in pipelines for found in everyone(results, pipeline)],
        "tables": [table(results, *parts) for parts in tables],
        "pictures": {name: caption for name, (caption, _) in pictures.items()},
        "values": [(n, v, f.metadata["text"]) for n, f, v in settings(plan.settings) if "text" in f.metadata],
    }
    template = files("fedunlearn.study.federated").joinpath("REPORT.md.jinja").read_text()
    page = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(**words)
    write_atomically(folder / "REPORT.md", page.encode())
    return folder / "REPORT.md"


def table(results: Results, case: Case, pipeline: str, rows: list[Row]) -> dict[str, Any]:
    """A table as words: a line for every strategy and moment, and one for what each strategy cost."""
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
        "columns": ["left", "rounds after", "strategy", *MEASURES.values()],
        "lines": lines,
        "cost_columns": ["strategy", *COSTS.values()],
        "costs": costs,
    }


def everyone(results: Results, pipeline: str) -> list[dict[str, Any]]:
    """Where every client is the target in turn: distances to gold over clients, and each beside what was foretold."""
    study = results.plan.settings.study
    cases = [case for case in results.plan.cases() if case.scenario == "everyone"]
    rows = {(row.strategy, row.after, row.forgotten[0]): row for case in cases for row in results.rows(case, pipeline)}
    asked = sorted({client for _, _, client in rows})
    distances = []
    for strategy, after in product(study.strategies, study.after):
        found = [rows[strategy, after, client] for client in asked if (strategy, after, client) in rows]
        if found:
            cells = [over_clients(found, measure) for measure in MEASURES]
            distances.append([label(strategy), str(after), str(len(found)), *cells])
    strategies = [*(s for s in study.strategies if any((s, 0, c) in rows for c in asked)), "gold"]
    served = []
    for client in asked:
        case = next(c for c in cases if c.left(0) == (client,))
        base = results.before(case, pipeline)
        known = [[row[f"{kind}_{client}"] for row in base] for kind in ("client", "unseen")]
        known.append(results.foretold(case, pipeline))
        values = [rows[s, 0, client].values["forgotten"] if (s, 0, client) in rows else [] for s in strategies]
        cells = [spread(numbers, "forgotten") for numbers in (*known, *values)]
        served.append([str(client), str(results.sizes[client]), *cells])
    if not asked:
        return []
    return [
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, distance to gold",
            "columns": ["strategy", "rounds after", "clients", *MEASURES.values()],
            "lines": distances,
        },
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, accuracy on its images when served",
            "columns": [
                "client",
                "images",
                "before",
                "unseen",
                "foretold",
                *(label(strategy) for strategy in strategies),
            ],
            "lines": served,
        },
    ]


def over_clients(rows: list[Row], measure: str) -> str:
    """Mean distance to gold ± standard deviation over clients; the largest and whose it is."""
    found = {row.forgotten[0]: row.distance(measure) for row in rows if not isnan(row.distance(measure))}
    if not found:
        return "–"
    worst = max(found, key=found.__getitem__)
    return f"{spread([*found.values()], measure)}; client {worst}: {number(found[worst], measure)}"


def cell(row: Row, measure: str) -> str:
    """Mean ± standard deviation over seeds, and the mean distance to gold (`Row.distance`) in parentheses."""
    text = spread(row.values.get(measure, []), measure)
    distance = row.distance(measure)
    return text if isnan(distance) else f"{text} ({number(distance, measure)})"


def spread(values: list[float], measure: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    text = number(statistics.fmean(values), measure)
    return f"{text} ± {number(statistics.stdev(values), measure)}" if len(values) > 1 else text


def as_csv(results: Results, tables: list[tuple[Case, str, list[Row]]]) -> str:
    """One line a number; a cost's is after 0 rounds, and has no gold."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV)
    for case, pipeline, rows in tables:
        for row in rows:
            who = "+".join(map(str, row.forgotten))
            for measure, values in row.values.items():
                gold = statistics.fmean(row.gold[measure]) if row.gold.get(measure) else nan
                numbers = [row.mean(measure), row.sd(measure), len(values), gold, row.distance(measure)]
                writer.writerow([case.name, pipeline, row.strategy, who, row.after, measure, *map(plain, numbers)])
        for strategy in results.plan.settings.study.strategies:
            for name, values in results.costs(case, pipeline, strategy).items():
                sd = statistics.stdev(values) if len(values) > 1 else nan
                numbers = [statistics.fmean(values), sd, len(values), nan, nan]
                who = "+".join(map(str, case.left(0)))
                writer.writerow([case.name, pipeline, strategy, who, 0, name, *map(plain, numbers)])
    return buffer.getvalue()


def plain(value: float) -> str:
    """Six digits; nothing for nan."""
    return "" if isnan(value) else f"{value:.6g}"
