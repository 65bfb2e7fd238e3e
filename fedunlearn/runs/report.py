"""What a run leaves for people: a summary table and one self-contained HTML page."""

import base64
import io
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from fedunlearn.config import Config, fields_of, values_of
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import memorisation_gap
from fedunlearn.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#6a994e", "#c8553d", "#e09f3e", "#7b2cbf", "#bc4b8a", "#5c4033")


def summary(run: Run) -> str:
    """One table: every group's class and client-ID accuracy before and after each request, and at the end."""
    table = Table(title=f"run {run.name}", title_justify="left")
    columns = ("when", "who", "images", "class accuracy", "memorisation gap", "client-ID accuracy")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for when, who, scores in score_rows(run):
        accuracies = f"{scores['class']:.3f}", memorisation_gap(scores), _client_id(who, scores)
        table.add_row(when, who, str(scores["examples"]), *accuracies)
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue().rstrip()


def score_rows(run: Run) -> list[tuple[str, str, dict[str, Any]]]:
    """(when, who, scores) for before and after every request, and for the last evaluated round."""
    points, evaluated = [], None
    for row in run.metrics():
        if row["kind"] == "forget":
            asked = ", ".join(map(str, row["clients"]))
            points += [(f"before forgetting {asked}", row["before"]), (f"after forgetting {asked}", row["after"])]
            evaluated = None
        elif "test" in row:
            evaluated = row
    if evaluated:
        points.append((f"after round {evaluated['round']}", evaluated))
    rows = []
    for when, scores in points:
        rows += [(when, f"client {client}", s) for client, s in scores["forgotten"].items()]
        rows += [(when, "retain clients", scores["retain"]), (when, "test", scores["test"])]
    return rows


def write(run: Run, class_counts: np.ndarray | None, class_names: list[str]) -> Path:
    """Write `report/index.html`; returns its path.

    Args:
        class_counts: training images of every client by class, [C, K], where an auditor knows them.
        class_names: K names.
    """
    meanings = {name: field.description for name, field in fields_of(Config)}  # a strategy's are in `fedunlearn config`
    template = files("fedunlearn.runs").joinpath("report.html.jinja").read_text()
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            run=run.name,
            config=run.config,
            about=run.about(),
            settings=[(name, value, meanings.get(name, "")) for name, value in values_of(run.config).items()],
            rows=[
                (when, who, scores, memorisation_gap(scores), _client_id(who, scores))
                for when, who, scores in score_rows(run)
            ],
            requests=run.ledger.requests(),
            chain_holds=run.ledger.verify(),
            split=None if class_counts is None else _embedded(split_figure(class_counts, class_names)),
            accuracy=_embedded(accuracy_figure(run.metrics())),
        )
    )
    path = run.folder / "report" / "index.html"
    write_atomically(path, page.encode())
    return path


def split_figure(counts: np.ndarray, class_names: list[str]) -> "Figure":
    """Heat map of examples, clients x classes (the paper's Figure 4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.6 + 0.34 * min(len(counts), 40)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts, cmap="YlGnBu", aspect="auto")
    few = counts.size <= 400
    axes.set(xlabel="class", ylabel="client")
    axes.set_xticks(range(len(class_names)) if few else [], class_names if few else [], rotation=40, ha="right")
    axes.set_yticks(range(len(counts)) if few else [])
    if few:
        for (client, k), count in np.ndenumerate(counts):
            colour = "white" if count > counts.max() / 2 else "black"
            axes.text(k, client, str(int(count)), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="training images")
    return figure


def accuracy_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Draw class and client-ID accuracy over the rounds, of retain clients, forgotten ones and the test set."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    requests = [row for row in rows if row["kind"] == "forget"]
    colours = dict(zip(_curves(rows, "class"), cycle(COLOURS), strict=False))
    for axes, measure in zip(figure.subplots(2, 1, sharex=True), ("class", "client_id"), strict=True):
        for who, points in _curves(rows, measure).items():
            axes.plot(*zip(*points, strict=True), label=who, color=colours[who], marker="o", markersize=3)
        for row in requests:
            axes.axvline(row["round"], color="0.6", linewidth=1)
            text = f"forget {', '.join(map(str, row['clients']))} "
            axes.annotate(text, (row["round"], 1), fontsize=8, color="0.35", ha="right", va="top")
        axes.set(ylim=(-0.02, 1.02), ylabel=f"{measure.replace('_id', '-ID')} accuracy")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", fontsize=8)
    axes.set_xlabel("round")
    return figure


def _curves(rows: list[dict[str, Any]], measure: str) -> dict[str, list[tuple[int, float]]]:
    """(round, accuracy) of the retain clients, of the test set, and of every client that was forgotten."""
    asked = [str(client) for row in rows if row["kind"] == "forget" for client in row["clients"]]
    curves: dict[str, list[tuple[int, float]]] = {}
    for round_, scores in (point for row in rows for point in _points(row)):
        groups = {"retain clients": scores["retain"]} | ({"test": scores["test"]} if measure == "class" else {})
        each = scores["retain_clients"] | scores["forgotten"]
        groups |= {f"client {client}": each[client] for client in asked if client in each}
        for who, accuracies in groups.items():
            curves.setdefault(who, []).append((round_, accuracies[measure]))
    return curves


def _points(row: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    if row["kind"] == "forget":
        return [(row["round"], row["before"]), (row["completed_round"], row["after"])]
    return [(row["round"], row)] if "test" in row else []


def _client_id(who: str, scores: dict[str, Any]) -> str:
    return "" if who == "test" else f"{scores['client_id']:.3f}"


def _embedded(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
