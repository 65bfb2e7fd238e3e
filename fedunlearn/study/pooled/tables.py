"""The paper's tables, each number of ours beside the paper's and the retrained model's (the paper's "gold")."""

import statistics
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import isnan, nan
from pathlib import Path
from typing import Any

from fedunlearn.study.dag.settings import PIPELINES, Pipeline
from fedunlearn.study.dag.tasks import Task
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.scores import Scores
from fedunlearn.study.pooled.settings import Head


@dataclass
class Cell:
    """One number of a table, from several places.

    Attributes:
        ours, retrained: of our model and of our retrained model, by seed.
        paper: the paper's number; nan where it has none.
        paper_deviation: the paper's deviation from its retrained model; nan where none is given.
    """

    ours: list[float] = field(default_factory=list)
    retrained: list[float] = field(default_factory=list)
    paper: float = nan
    paper_deviation: float = nan

    @property
    def mean(self) -> float:
        """Mean of ours; nan where there are none."""
        return statistics.fmean(self.ours) if self.ours else nan

    @property
    def sd(self) -> float:
        """Standard deviation of ours over seeds; nan for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else nan

    @property
    def retrained_mean(self) -> float:
        """Mean of the retrained models'; nan where there are none."""
        return statistics.fmean(self.retrained) if self.retrained else nan

    @property
    def deviation(self) -> float:
        """Mean over seeds of |ours - the retrained model's|; nan where there is none."""
        if not self.retrained:
            return nan
        return statistics.fmean(abs(a - b) for a, b in zip(self.ours, self.retrained, strict=True))


@dataclass
class Row:
    """One line of a table: a pipeline, or a method of pruning."""

    name: str
    cells: list[Cell]
    note: str = ""
    paper_note: str = ""


@dataclass
class Table:
    """One of the paper's tables, or one of ours (without a number)."""

    number: int | None
    kind: str
    caption: str
    columns: list[str]
    rows: list[Row]
    here: bool = True  # whether it is of this study's data set

    @property
    def name(self) -> str:
        """Name of the table's files."""
        return f"table-{self.number:02d}" if self.number else self.kind


def paper() -> list[dict[str, Any]]:
    """Read `paper.toml`, table by table."""
    return tomllib.loads(files("fedunlearn.study.pooled").joinpath("paper.toml").read_text())["table"]


def all_tables(plan: Plan, root: Path) -> list[Table]:
    """Make Tables 1-18 with what this study has measured so far, then comparisons of our own."""
    tables = Tables(plan, root)
    return [*(tables.build(entry) for entry in paper()), tables.heads(), tables.searches()]


class Tables:
    """Fills tables from a study's results."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.settings, self.order = plan.settings, plan.order
        self.dataset = "cifar100" if self.settings.dataset == "cifar100" else "cifar10"

    def build(self, entry: dict[str, Any]) -> Table:
        """Make one of the paper's tables."""
        columns, rows = getattr(self, f"_{entry['kind']}")(entry)
        here = entry.get("dataset", self.dataset) == self.dataset
        if not here:
            for row in rows:
                row.note = ""
                for cell in row.cells:
                    cell.ours, cell.retrained = [], []
        return Table(entry["number"], entry["kind"], entry["caption"], columns, rows, here)

    def heads(self) -> Table:
        """Compare stage 1 by the class head's Fisher and by the client head's (Section 4.4)."""
        columns, rows = self._stage_columns(1), []
        for pipeline in self._mtl():
            heads: tuple[Head, ...] = ("class", "client")
            for head in heads:
                pairs = self._pairs(
                    lambda seed, p=pipeline, h=head: self.plan.ssd(p, 1, seed, loss_head=h), pipeline, 1
                )
                rows.append(Row(f"{PIPELINES[pipeline]}, {head} head", self._cells(columns, pairs)))
        caption = "Section 4.4: stage 1 without fine-tuning, by the head whose loss the Fisher is of"
        return Table(None, "heads", caption, columns, rows)

    def searches(self) -> Table:
        """Compare stage 1 by what the search minimises, and by what it takes alpha for."""
        columns, rows = self._stage_columns(1), []
        for pipeline in self.settings.study.pipelines:
            for search in self.plan.searches():
                pairs = self._pairs(lambda seed, p=pipeline, s=search: self.plan.ssd(p, 1, seed, search=s), pipeline, 1)
                label = f"{PIPELINES[pipeline]}, objective {search.objective}, alpha is {search.reading}"
                rows.append(Row(label, self._cells(columns, pairs)))
        caption = "Stage 1 without fine-tuning, by what the search minimises and by what the paper's alpha is taken for"
        return Table(None, "searches", caption, columns, rows)

    def _counts(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        counted = entry["rows"][self.dataset]
        ours = [len(owned) for owned in self.plan.workspace.slices]
        columns = [f"client_{client}" for client in range(len(counted))]
        cells = [Cell(paper=value) for value in counted]
        if len(ours) == len(cells):
            for cell, value in zip(cells, ours, strict=True):
                cell.ours = [float(value)]
        return columns, [Row("training images", cells)]

    def _learning(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        rows, names = [], {"train": "retain", "id_train": "id_retain", "test": "test"}
        for pipeline, label in PIPELINES.items():
            done = self._done(lambda seed, p=pipeline: self.plan.base(p, seed))
            cells = [Cell(paper=value) for value in entry["rows"][pipeline]["values"]]
            for cell, column in zip(cells, entry["columns"], strict=True):
                learned = [task.result(self.root)["learning"] for task in done]
                cell.ours = [scores[names[column]] for scores in learned if names[column] in scores]
            rows.append(Row(label, cells))
        return entry["columns"], rows

    def _rebound(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        columns, rows = entry["columns"], []
        for pipeline in self._mtl():
            done = self._done(lambda seed, p=pipeline: self.plan.rebound(p, seed))
            results = [task.result(self.root) for task in done]
            last = pipeline == "ce_dl"  # the paper does not say which of its two
            cells = [Cell(paper=value if last else nan) for value in entry["rows"]["ours"]["values"]]
            for cell, column in zip(cells, columns, strict=True):
                when = "after_epoch" if column.endswith("_after_epoch") else "after_ssd"
                name = self._ours(column.removesuffix("_after_epoch"))
                cell.ours = [result[when][name] for result in results]
            rows.append(Row(PIPELINES[pipeline], cells))
        return columns, rows

    def _stage(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        stage, history, rows = entry["stage"], entry["history"], []
        if stage > len(self.order):
            return entry["columns"], [
                Row(PIPELINES[p], [Cell(paper=value) for value in row["values"]]) for p, row in entry["rows"].items()
            ]
        for pipeline, label in PIPELINES.items():
            theirs = entry["rows"][pipeline]

            def made(seed: int, pipeline: Pipeline = pipeline) -> Task:
                if history == "tuned":
                    return self.plan.finetune(pipeline, stage, seed)
                return self.plan.ssd(pipeline, stage, seed)

            pairs = self._pairs(made, pipeline, stage)
            cells = self._cells(self._stage_columns(stage), pairs)
            for cell, value, delta in zip(cells, theirs["values"], theirs["deltas"], strict=True):
                cell.paper, cell.paper_deviation = value, delta
            cells[-1].paper_deviation *= 100  # MIA accuracy's is given as a fraction of its percent
            note = ""
            if history == "tuned":
                epochs = [task.result(self.root)["chosen"]["epochs"] for task, _ in pairs]
                note = ", ".join("no" if not count else f"yes ({count})" for count in epochs)
            rows.append(Row(label, cells, note, theirs.get("finetuned", "")))
        return self._stage_columns(stage), rows

    def _retrained(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        rows, columns = [], self._stage_columns(1)
        for pipeline, label in PIPELINES.items():
            done = self._done(lambda seed, p=pipeline: self.plan.retrained(p, 1, seed))
            cells = self._cells(columns, [(task, None) for task in done])
            for cell, value in zip(cells, entry["rows"].get(pipeline, {}).get("values", []), strict=False):
                cell.paper = value
            rows.append(Row(label, cells))
        return columns, rows

    def _ablation(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        columns, rows = self._stage_columns(1), []
        pipeline, usual = self.settings.ablation.pipeline, self.settings.finetuning.epochs
        ablation = self.settings.ablation
        fractions = list(zip(ablation.fractions, ablation.retain_fractions, strict=True))
        for theirs in entry["rows"]["ce_dl"]:
            method, fraction, heads = theirs["method"], theirs["fraction"], theirs["heads"]
            retain_fraction = next((r for f, r in fractions if f == fraction), 0.0)
            label = f"{method}, {fraction:g}{f' / {retain_fraction:g}' if method != 'DeepClean' else ''}"
            label += ", heads tuned" if heads else ", heads fixed"
            cells = [Cell(paper=value if pipeline == "ce_dl" else nan) for value in theirs["values"]]
            about = (method, fraction, retain_fraction, heads)
            pairs = self._pairs(lambda seed, about=about: self.plan.pruned(*about, seed), pipeline, 1)
            curves = [task.result(self.root)["curve"] for task, _ in pairs]
            epoch = min(usual, ablation.epochs)
            for cell, column in zip(cells, columns, strict=True):
                cell.ours = [curve[epoch][column] for curve in curves]
                cell.retrained = [retrained.result(self.root)["scores"][0][column] for _, retrained in pairs]
            last = [curve[-1]["id_retain"] for curve in curves]
            note = f"client-ID {statistics.fmean(last):.3f} after {len(curves[0]) - 1} epochs" if last else ""
            rows.append(Row(label, cells, note))
        return columns, rows

    def _pairs(self, made: Callable[[int], Task], pipeline: Pipeline, stage: int) -> list[tuple[Task, Task]]:
        """Give a model's task and that of its retrained model, by seed, as far as both are done."""
        seeds = self.settings.study.seeds
        pairs = [(made(seed), self.plan.retrained(pipeline, stage, seed)) for seed in seeds]
        return [pair for pair in pairs if all(task.is_done(self.root) for task in pair)]

    def _cells(self, columns: Sequence[str], pairs: Sequence[tuple[Task, Task | None]]) -> list[Cell]:
        cells = [Cell() for _ in columns]
        for task, retrained in pairs:
            ours = task.result(self.root)["scores"][0]
            target: Scores = retrained.result(self.root)["scores"][0] if retrained else {}
            for cell, column in zip(cells, columns, strict=True):
                if column in ours:
                    cell.ours.append(ours[column])
                    cell.retrained += [target[column]] if target else []
        return cells

    def _done(self, made: Callable[[int], Task]) -> list[Task]:
        tasks = [made(seed) for seed in self.settings.study.seeds]
        return [task for task in tasks if task.is_done(self.root)]

    def _mtl(self) -> list[Pipeline]:
        return [pipeline for pipeline in PIPELINES if pipeline != "no_mtl"]

    def _stage_columns(self, stage: int) -> list[str]:
        clients = [f"client_{client}" for client in self.order[:stage]]
        return [*clients, "retain", "test", *(f"id_{client}" for client in clients), "id_retain", "mia"]

    def _ours(self, column: str) -> str:
        """Name our column for the paper's: its `client_0` is the first that is forgotten."""
        return column.replace("client_0", f"client_{self.order[0]}")


def number(value: float, column: str = "") -> str:
    """Write a number for people: four digits, MIA in percent with two, counts without; a dash for nan."""
    if isnan(value):
        return "–"
    if column == "mia":
        return f"{value:.2f}"
    return f"{value:,.0f}" if value > 1 else f"{value:.4f}"


def heading(column: str) -> str:
    """Write a column's name for people: `id_client_0` -> `ID of client 0`."""
    words = column.replace("_", " ")
    if words.startswith("id "):
        words = f"ID of {words[3:]}"
    return {"mia": "MIA %"}.get(column, words)
