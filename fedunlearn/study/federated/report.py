"""What a federated study leaves for people: a page, REPORT.md, results.csv and pictures."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import product
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Environment

from fedunlearn.config import settings
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import duration
from fedunlearn.runs.page import embedded, encoded, rendered
from fedunlearn.runs.uncertainty import fraction, held_out
from fedunlearn.runs.verdicts import Verdict
from fedunlearn.study.dag.settings import PIPELINES, Pipeline
from fedunlearn.study.federated.figures import frontier, story
from fedunlearn.study.federated.plan import Case, Plan
from fedunlearn.study.federated.settings import FederatedSettings, key_of
from fedunlearn.study.federated.tables import COSTS, MEASURES, RETRAINED, Results, Row, label, number, reach, title
from fedunlearn.study.federated.verdicts import compared, verdicts
from fedunlearn.study.pooled.report import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV = ("case", "pipeline", "strategy", "forgotten", "after", "measure", "mean", "sd", "seeds", "retrained", "distance")
RESURFACED, INSIDE = "resurfaced", "as near as another retrained model"
HIDDEN = ("data.root", "study.home")  # where files lie on a machine is nobody else's business

Table = tuple[Case, Pipeline, list[Row]]


def write(plan: Plan, root: Path) -> Path:
    """Write the study's `report/` from what has been measured so far; returns the path of `index.html`."""
    folder, results = root / "report", Results(plan, root)
    pipelines: list[Pipeline] = [pipeline for pipeline in PIPELINES if pipeline in plan.settings.study.pipelines]
    tables = [table for case in distinct(plan.cases()) for p in pipelines if (table := rows_of(results, case, p))]
    write_atomically(folder / "results.csv", as_csv(results, tables).encode())
    drawn = draw(tables, results)
    for name, (_, figure) in drawn.items():
        write_atomically(folder / f"{name}.svg", svg(figure))
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
        "pictures": {name: caption for name, (caption, _) in drawn.items()},
        "values": list(shown_settings(plan.settings)),
    }
    template = files("fedunlearn.study.federated").joinpath("REPORT.md.jinja").read_text()
    text = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template).render(**words)
    write_atomically(folder / "REPORT.md", encoded(text))
    embedding = {name: (caption, embedded(figure)) for name, (caption, figure) in drawn.items()}
    about, said = said_of(results, main_table(tables))
    page = rendered(
        "fedunlearn.study.federated",
        "index.html.jinja",
        **words | {"pictures": embedding, "about": about, "said": said},
    )
    write_atomically(folder / "index.html", encoded(page))
    return folder / "index.html"


def said_of(results: Results, table: Table | None) -> tuple[str, list[Verdict]]:
    """Say which case the verdicts are about, and how near each strategy comes to the retrained model in it."""
    if table is None:
        return "", []
    case, pipeline, rows = table
    forgotten, found = case.forgotten(0), []
    sizes = {measure: images_of(results, forgotten, measure) for measure in ("forget", "test")}
    for one in compared(rows, forgotten, sizes):
        costs = results.costs(case, pipeline, one.row.strategy)
        work = statistics.fmean(costs["work"]) if costs else nan
        found.append(one if isnan(work) else replace(one, work=work))
    return title(case, pipeline), verdicts(found)


def main_table(tables: list[Table]) -> Table | None:
    """Give the table that is drawn and spoken of: the first case, in its last pipeline."""
    return next(reversed([table for table in tables if table[0] == tables[0][0]]), None)


def images_of(results: Results, forgotten: Sequence[int], measure: str) -> int:
    """Count the images that a measure is an accuracy of."""
    asked = sum(results.sizes[client] for client in forgotten)
    if measure == "test":
        return len(results.plan.workspace.dataset.test.labels)
    return asked if measure == "forget" else sum(results.sizes) - asked


def error_of(results: Results, row: Row, measure: str) -> float | None:
    """Give the standard error of one seed's measure, as it is of so many images; None where none is known."""
    values, images = row.values.get(measure, []), images_of(results, row.forgotten, measure)
    if len(values) != 1:
        return None
    if measure in ("forget", "retain", "test", "id"):
        return fraction(values[0], images).error
    if measure != "gap":
        return None
    own, workspace = row.values["forget"][0], results.plan.workspace
    labels = np.asarray(workspace.dataset.train.labels)
    counts = sum(np.bincount(labels[workspace.slices[c]], minlength=labels.max() + 1) for c in row.forgotten)
    test = len(workspace.dataset.test.labels)
    forget = fraction(own, images_of(results, row.forgotten, "forget"))
    return (forget - held_out(own - values[0], test, np.asarray(counts))).error


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


def draw(tables: list[Table], results: Results) -> dict[str, tuple[str, "Figure"]]:
    """Draw the first case, in its last pipeline; returns captions and figures by file name."""
    table = main_table(tables)
    if table is None:
        return {}
    case, pipeline, _ = table
    asked = title(case, pipeline)
    return {
        "story": (f"Before and after a request, mean over seeds ({asked})", story(results, case, pipeline)),
        "frontier": (f"Distance to the retrained model against cost ({asked})", frontier(results, case, pipeline)),
    }


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
    lines, limit = [], reach(rows, "forget")
    for row in rows:
        cells = [cell(row, measure, error_of(results, row, measure)) for measure in MEASURES]
        cells += [spread(results.resurfaced(row), "gap"), inside([row], limit)]
        lines.append([", ".join(map(str, row.forgotten)), str(row.after), label(row.strategy), *cells])
    costs = []
    for strategy in results.plan.settings.study.strategies:
        found = results.costs(case, pipeline, strategy)
        if found:
            costs.append([label(strategy), *(spread(found[name], name) for name in COSTS)])
    return {
        "title": title(case, pipeline),
        "by": 2,
        "columns": ["forgotten", "rounds after", "strategy", *MEASURES.values(), RESURFACED, INSIDE],
        "lines": lines,
        "cost_columns": ["strategy", *COSTS.values()],
        "costs": costs,
    }


def everyone(results: Results, pipeline: Pipeline) -> list[dict[str, Any]]:
    """Write two tables of the scenario in which every client is forgotten in turn; none where it is not studied."""
    cases = [case for case in results.plan.cases() if case.scenario == "everyone"]
    rows = {(row.strategy, row.after, row.forgotten[0]): row for case in cases for row in results.rows(case, pipeline)}
    asked = sorted({client for _, _, client in rows})
    cases = [case for case in cases if case.forgotten(0)[0] in asked]
    if not asked:
        return []
    applied, strategies = accuracies_when_applied(results, pipeline, cases, rows)
    return [
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, beside the retrained model",
            "by": 0,
            "columns": ["strategy", "rounds after", "clients", *MEASURES.values(), RESURFACED, INSIDE],
            "lines": differences(results, rows, asked),
            "cost_columns": ["strategy", "clients", *COSTS.values()],
            "costs": costs_over_clients(results, pipeline, cases),
        },
        {
            "title": f"{PIPELINES[pipeline]}: every client in turn, accuracy on its images when applied",
            "by": 0,
            "columns": ["client", "images", "before", "held-out", "estimated", *map(label, strategies)],
            "lines": applied,
        },
    ]


def differences(results: Results, rows: dict[tuple[str, int, int], Row], asked: list[int]) -> list[list[str]]:
    """Write differences to the retrained model, over clients: a line for every strategy and time."""
    study, lines, limit = results.plan.settings.study, [], reach(rows.values(), "forget")
    for strategy, after in product([*study.strategies, RETRAINED], study.after):
        found = [rows[strategy, after, client] for client in asked if (strategy, after, client) in rows]
        if found:
            cells = [over_clients(found, measure) for measure in MEASURES]
            cells += [spread([rate for row in found for rate in results.resurfaced(row)], "gap"), inside(found, limit)]
            compared = sum(not isnan(row.distance("forget")) for row in found)
            lines.append([label(strategy), str(after), str(compared), *cells])
    return lines


def costs_over_clients(results: Results, pipeline: Pipeline, cases: list[Case]) -> list[list[str]]:
    """Write what a request cost, over clients: a line a strategy."""
    lines = []
    for strategy in results.plan.settings.study.strategies:
        found = [costs for case in cases if (costs := results.costs(case, pipeline, strategy))]
        if found:
            cells = [spread([statistics.fmean(costs[name]) for costs in found], name) for name in COSTS]
            lines.append([label(strategy), str(len(found)), *cells])
    return lines


def accuracies_when_applied(
    results: Results, pipeline: Pipeline, cases: list[Case], rows: dict[tuple[str, int, int], Row]
) -> tuple[list[list[str]], list[str]]:
    """Write each client's accuracy before and after, beside the estimate: a line a client; and which strategies."""
    study, applied = results.plan.settings.study, {strategy for strategy, after, _ in rows if after == 0}
    strategies = [*(strategy for strategy in study.strategies if strategy in applied), RETRAINED]
    lines = []
    for case in cases:
        (client,) = case.forgotten(0)
        base = results.before(case, pipeline)
        known = [[row[f"{kind}_{client}"] for row in base] for kind in ("client", "held_out")]
        known.append(results.estimated(case, pipeline))
        values = [rows[s, 0, client].values["forget"] if (s, 0, client) in rows else [] for s in strategies]
        cells = [spread(numbers, "forget") for numbers in (*known, *values)]
        lines.append([str(client), str(results.sizes[client]), *cells])
    return lines, strategies


def over_clients(rows: list[Row], measure: str) -> str:
    """Write the mean difference to the retrained model ± deviation over clients, and the distance.

    Differences of two signs cancel out, distances do not. The mean distance stands in parentheses, with the largest
    and whose it is. Of retrained models themselves, there is the distance alone.
    """
    found = {row.forgotten[0]: row.distance(measure) for row in rows if not isnan(row.distance(measure))}
    if not found:
        return "–"
    worst = max(found, key=found.__getitem__)
    apart = f"({number(statistics.fmean(found.values()), measure)}; client {worst}: {number(found[worst], measure)})"
    signed = [row.difference(measure) for row in rows if row.strategy != RETRAINED]
    mean = spread([one for one in signed if not isnan(one)], measure, sign="+")
    return f"{mean} {apart}" if signed else apart


def inside(rows: Sequence[Row], limit: float) -> str:
    """Write how many models know the client as well as a retrained model, to within what two of these are apart.

    Args:
        rows: of the models.
        limit: the distance that counts, fixed by the retrained models alone (`tables.reach`).
    """
    apart = [abs(a - b) for row in rows if row.strategy != RETRAINED for a, b in row.pairs("forget")]
    if isnan(limit):
        return "–"
    within = f"{sum(distance <= limit for distance in apart)} of {len(apart)} " if apart else ""
    return f"{within}(± {number(limit, 'forget')})"


def cell(row: Row, measure: str, error: float | None = None) -> str:
    """Write a mean ± deviation over seeds (of one seed: standard error), and the mean distance to the retrained model.

    The distance stands in parentheses.
    """
    text = spread(row.values.get(measure, []), measure, error)
    distance = row.distance(measure)
    return text if isnan(distance) else f"{text} ({number(distance, measure)})"


def spread(values: list[float], measure: str, error: float | None = None, sign: Literal["", "+"] = "") -> str:
    """Write mean ± standard deviation; of a single value, ± its standard error if that is known."""
    if not values:
        return "–"
    text = number(statistics.fmean(values), measure, sign)
    around = statistics.stdev(values) if len(values) > 1 else error
    return text if around is None else f"{text} ± {number(around, measure)}"


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
