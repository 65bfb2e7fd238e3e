"""The paper's tables, each number of ours beside the paper's and gold's."""

import statistics
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import isnan, nan
from pathlib import Path
from typing import Any

from fedunlearn.study.dag.steps import Step
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.scores import Scores
from fedunlearn.study.pooled.settings import PIPELINES


@dataclass
class Cell:
    """One number: ours and gold's by seed, the paper's, and the paper's deviation from its gold (nan: none given)."""

    ours: list[float] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    paper: float = nan
    paper_deviation: float = nan

    @property
    def mean(self) -> float:
        """Of ours; nan where there are none."""
        return statistics.fmean(self.ours) if self.ours else nan

    @property
    def sd(self) -> float:
        """Standard deviation of ours over seeds; nan for fewer than two."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else nan

    @property
    def gold_mean(self) -> float:
        """Of gold's; nan where there are none."""
        return statistics.fmean(self.gold) if self.gold else nan

    @property
    def deviation(self) -> float:
        """Mean over seeds of |ours - gold's|; nan where there is no gold."""
        return statistics.fmean(abs(a - b) for a, b in zip(self.ours, self.gold, strict=True)) if self.gold else nan


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
        """Of its files."""
        return f"table-{self.number:02d}" if self.number else self.kind


def paper() -> list[dict[str, Any]]:
    """The content of `paper.toml`, table by table."""
    return tomllib.loads(files("fedunlearn.study.pooled").joinpath("paper.toml").read_text())["table"]


def all_tables(plan: Plan, root: Path) -> list[Table]:
    """Tables 1-18 with what this study has measured so far, then comparisons of our own."""
    tables = Tables(plan, root)
    return [*(tables.build(entry) for entry in paper()), tables.heads(), tables.searches()]


class Tables:
    """Fills tables from a study's results."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.settings, self.order = plan.settings, plan.order
        self.dataset = "cifar100" if self.settings.dataset == "cifar100" else "cifar10"

    def build(self, entry: dict[str, Any]) -> Table:
        """One of the paper's."""
        columns, rows = getattr(self, f"_{entry['kind']}")(entry)
        here = entry.get("dataset", self.dataset) == self.dataset
        if not here:
            for row in rows:
                row.note = ""
                for cell in row.cells:
                    cell.ours, cell.gold = [], []
        return Table(entry["number"], entry["kind"], entry["caption"], columns, rows, here)

    def heads(self) -> Table:
        """Section 4.4: stage 1 by the class head's Fisher and by the client head's."""
        columns, rows = self._stage_columns(1), []
        for pipeline in self._mtl():
            for head in ("class", "client"):
                steps = self._pairs(lambda seed, p=pipeline, h=head: self.plan.ssd(p, 1, seed, head=h), pipeline, 1)
                rows.append(Row(f"{PIPELINES[pipeline]}, {head} head", self._cells(columns, steps)))
        caption = "Section 4.4: stage 1 without fine-tuning, by the head whose loss the Fisher is of"
        return Table(None, "heads", caption, columns, rows)

    def searches(self) -> Table:
        """Stage 1 by what the search minimises, and by what it takes alpha for."""
        columns, rows = self._stage_columns(1), []
        for pipeline in self.settings.study.pipelines:
            for search in self.plan.searches():
                pairs = self._pairs(lambda seed, p=pipeline, s=search: self.plan.ssd(p, 1, seed, **s), pipeline, 1)
                label = f"{PIPELINES[pipeline]}, objective {search['objective']}, alpha is {search['reading']}"
                rows.append(Row(label, self._cells(columns, pairs)))
        caption = "Stage 1 without fine-tuning, by what the search minimises and by what the paper's alpha is taken for"
        return Table(None, "searches", caption, columns, rows)

    def _counts(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        counted = entry["rows"][self.dataset]
        ours = [len(owned) for owned in self.plan.lab.slices]
        columns = [f"client_{client}" for client in range(len(counted))]
        cells = [Cell(paper=value) for value in counted]
        if len(ours) == len(cells):
            for cell, value in zip(cells, ours, strict=True):
                cell.ours = [float(value)]
        return columns, [Row("training images", cells)]

    def _learning(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        rows, names = [], {"train": "others", "id_train": "id_others", "test": "test"}
        for pipeline, label in PIPELINES.items():
            done = self._done(lambda seed, p=pipeline: self.plan.base(p, seed))
            cells = [Cell(paper=value) for value in entry["rows"][pipeline]["values"]]
            for cell, column in zip(cells, entry["columns"], strict=True):
                learned = [step.result(self.root)["learning"] for step in done]
                cell.ours = [scores[names[column]] for scores in learned if names[column] in scores]
            rows.append(Row(label, cells))
        return entry["columns"], rows

    def _rebound(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        columns, rows = entry["columns"], []
        for pipeline in self._mtl():
            done = self._done(lambda seed, p=pipeline: self.plan.rebound(p, seed))
            results = [step.result(self.root) for step in done]
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

            def made(seed: int, pipeline: str = pipeline) -> Step:
                if history == "tuned":
                    return self.plan.finetune(pipeline, stage, seed)
                return self.plan.ssd(pipeline, stage, seed)

            pairs = self._pairs(made, pipeline, stage)
            cells = self._cells(self._stage_columns(stage), pairs)
            for cell, value, delta in zip(cells, theirs["values"], theirs["deltas"], strict=True):
                cell.paper, cell.paper_deviation = value, delta
            cells[-1].paper_deviation *= 100  # the attack's is given as a share of its percent
            note = ""
            if history == "tuned":
                epochs = [step.result(self.root)["chosen"]["epochs"] for step, _ in pairs]
                note = ", ".join("no" if not count else f"yes ({count})" for count in epochs)
            rows.append(Row(label, cells, note, theirs.get("finetuned", "")))
        return self._stage_columns(stage), rows

    def _gold(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        rows, columns = [], self._stage_columns(1)
        for pipeline, label in PIPELINES.items():
            golds = self._done(lambda seed, p=pipeline: self.plan.gold(p, 1, seed))
            cells = self._cells(columns, [(step, None) for step in golds])
            for cell, value in zip(cells, entry["rows"].get(pipeline, {}).get("values", []), strict=False):
                cell.paper = value
            rows.append(Row(label, cells))
        return columns, rows

    def _ablation(self, entry: dict[str, Any]) -> tuple[list[str], list[Row]]:
        columns, rows = self._stage_columns(1), []
        pipeline, usual = self.settings.ablation.pipeline, self.settings.finetuning.epochs
        shares = list(zip(self.settings.ablation.shares, self.settings.ablation.retain_shares, strict=True))
        for theirs in entry["rows"]["ce_dl"]:
            method, share, heads = theirs["method"], theirs["share"], theirs["heads"]
            retain_share = next((r for s, r in shares if s == share), 0.0)
            label = f"{method}, {share:g}{f' / {retain_share:g}' if method != 'DeepClean' else ''}"
            label += ", heads tuned" if heads else ", heads fixed"
            cells = [Cell(paper=value if pipeline == "ce_dl" else nan) for value in theirs["values"]]
            about = (method, share, retain_share, heads)
            pairs = self._pairs(lambda seed, about=about: self.plan.pruned(*about, seed), pipeline, 1)
            curves = [step.result(self.root)["curve"] for step, _ in pairs]
            epoch = min(usual, self.settings.ablation.epochs)
            for cell, column in zip(cells, columns, strict=True):
                cell.ours = [curve[epoch][column] for curve in curves]
                cell.gold = [gold.result(self.root)["scores"][0][column] for _, gold in pairs]
            last = [curve[-1]["id_others"] for curve in curves]
            note = f"client-ID {statistics.fmean(last):.3f} after {len(curves[0]) - 1} epochs" if last else ""
            rows.append(Row(label, cells, note))
        return columns, rows

    def _pairs(self, made: Callable[[int], Step], pipeline: str, stage: int) -> list[tuple[Step, Step]]:
        seeds = self.settings.study.seeds
        pairs = [(made(seed), self.plan.gold(pipeline, stage, seed)) for seed in seeds]
        return [pair for pair in pairs if all(step.is_done(self.root) for step in pair)]

    def _cells(self, columns: Sequence[str], pairs: Sequence[tuple[Step, Step | None]]) -> list[Cell]:
        cells = [Cell() for _ in columns]
        for step, gold in pairs:
            ours = step.result(self.root)["scores"][0]
            target: Scores = gold.result(self.root)["scores"][0] if gold else {}
            for cell, column in zip(cells, columns, strict=True):
                if column in ours:
                    cell.ours.append(ours[column])
                    cell.gold += [target[column]] if target else []
        return cells

    def _done(self, made: Callable[[int], Step]) -> list[Step]:
        steps = [made(seed) for seed in self.settings.study.seeds]
        return [step for step in steps if step.is_done(self.root)]

    def _mtl(self) -> list[str]:
        return [pipeline for pipeline in PIPELINES if pipeline != "no_mtl"]

    def _stage_columns(self, stage: int) -> list[str]:
        clients = [f"client_{client}" for client in self.order[:stage]]
        return [*clients, "others", "test", *(f"id_{client}" for client in clients), "id_others", "mia"]

    def _ours(self, column: str) -> str:
        """The paper's `client_0` is the first that leaves."""
        return column.replace("client_0", f"client_{self.order[0]}")


def number(value: float, column: str = "") -> str:
    """For people: four digits, MIA in percent with two, counts without; a dash for nan."""
    if isnan(value):
        return "–"
    if column == "mia":
        return f"{value:.2f}"
    return f"{value:,.0f}" if value > 1 else f"{value:.4f}"


def heading(column: str) -> str:
    """For people: `id_client_0` -> `ID of client 0`."""
    words = column.replace("_", " ")
    if words.startswith("id "):
        words = f"ID of {words[3:]}"
    return {"mia": "MIA %"}.get(column, words)
