"""What a run leaves for people: a summary table and one self-contained HTML page."""

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from rich.console import Console
from rich.table import Table

from fedunlearn.config import settings
from fedunlearn.data.datasets import Dataset
from fedunlearn.federation.client import Worker
from fedunlearn.runs.checkpoint import write_atomically
from fedunlearn.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#6a994e", "#c8553d", "#e09f3e", "#7b2cbf", "#bc4b8a", "#5c4033")


def summary(run: Run) -> str:
    """One table: every group's class and client-ID accuracy before and after each request, and at the end."""
    table = Table(title=f"run {run.name}", title_justify="left")
    columns = ("when", "who", "images", "class accuracy", "memory gap", "client-ID accuracy")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for when, who, scores in score_rows(run):
        accuracies = f"{scores['class']:.3f}", gap(scores), _client_id(who, scores)
        table.add_row(when, who, str(scores["examples"]), *accuracies)
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue().rstrip()


def score_rows(run: Run) -> list[tuple[str, str, dict[str, Any]]]:
    """(when, who, scores) for before and after every request, and for the last evaluated round."""
    moments, evaluated = [], None
    for row in run.metrics():
        if row["kind"] == "forget":
            asked = ", ".join(map(str, row["clients"]))
            moments += [(f"before forgetting {asked}", row["before"]), (f"after forgetting {asked}", row["after"])]
            evaluated = None
        elif "test" in row:
            evaluated = row
    if evaluated:
        moments.append((f"after round {evaluated['round']}", evaluated))
    rows = []
    for when, scores in moments:
        rows += [(when, f"client {client}", s) for client, s in scores["forgotten"].items()]
        rows += [(when, "others", scores["others"]), (when, "test", scores["test"])]
    return rows


def write(run: Run, worker: Worker) -> Path:
    """Write `report/index.html`; returns its path."""
    template = files("fedunlearn.runs").joinpath("report.html.jinja").read_text()
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            run=run.name,
            config=run.config,
            about=run.about(),
            settings=[(name, value, field.metadata["text"]) for name, field, value in settings(run.config)],
            rows=[(when, who, scores, gap(scores), _client_id(who, scores)) for when, who, scores in score_rows(run)],
            requests=run.ledger.requests(),
            chain_holds=run.ledger.verify(),
            split=_embedded(split_figure(class_counts(worker.dataset, worker.slices), worker.dataset.class_names)),
            accuracy=_embedded(accuracy_figure(run.metrics())),
        )
    )
    path = run.folder / "report" / "index.html"
    write_atomically(path, page.encode())
    return path


def class_counts(dataset: Dataset, slices: Sequence[np.ndarray]) -> np.ndarray:
    """Training examples of every client, who owns a slice of them, by class, [C, K]."""
    labels, classes = np.asarray(dataset.train.labels), len(dataset.class_names)
    return np.stack([np.bincount(labels[owned], minlength=classes) for owned in slices])


def duration(seconds: float) -> str:
    """`75` -> `1 min 15 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


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
            axes.text(k, client, int(count), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="training images")
    return figure


def accuracy_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Class and client-ID accuracy over the rounds, of those who stay, those who left and the test set."""
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
    """(round, accuracy) of the others, of the test set, and of every client that left, before it did and after."""
    left = [str(client) for row in rows if row["kind"] == "forget" for client in row["clients"]]
    curves: dict[str, list[tuple[int, float]]] = {}
    for round_, scores in (moment for row in rows for moment in _moments(row)):
        groups = {"others": scores["others"]} | ({"test": scores["test"]} if measure == "class" else {})
        everybody = scores["staying"] | scores["forgotten"]
        groups |= {f"client {client}": everybody[client] for client in left if client in everybody}
        for who, accuracies in groups.items():
            curves.setdefault(who, []).append((round_, accuracies[measure]))
    return curves


def _moments(row: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    if row["kind"] == "forget":
        return [(row["round"], row["before"]), (row["completed_round"], row["after"])]
    return [(row["round"], row)] if "test" in row else []


def gap(scores: dict[str, Any]) -> str:
    """A forgotten client's class accuracy less what unseen images of its class mix get from the same model."""
    return f"{scores['class'] - scores['unseen']:+.3f}" if "unseen" in scores else ""


def _client_id(who: str, scores: dict[str, Any]) -> str:
    return "" if who == "test" else f"{scores['client_id']:.3f}"


def _embedded(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
