"""What a federated study has measured, beside gold: one row a strategy and moment, mean over seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import isnan, nan
from pathlib import Path
from typing import Any

from fedunlearn.study.dag.steps import Step
from fedunlearn.study.federated.plan import Case, Plan
from fedunlearn.study.pooled.settings import PIPELINES

NAMES = {
    "subset": "unseen answers (ours)",
    "ssd": "SSD",
    "leave": "leave and continue",
    "ascent": "gradient ascent",
    "pga": "PGA",
    "federaser": "FedEraser",
    "negate": "NoT",
    "gold": "gold (retraining)",
}


def label(strategy: str) -> str:
    """What tables and pictures call a strategy; one of somebody's own (`module:Class`) by its class."""
    return NAMES.get(strategy, strategy.rpartition(":")[2])


MEASURES = {
    "forgotten": "forgotten",
    "gap": "memory gap",
    "others": "others",
    "test": "test",
    "id": "client ID, others",
    "mia": "attack, %",
}
COSTS = {
    "work": "work, % of retraining",
    "rounds": "rounds until served",
    "bytes": "MB",
    "seconds": "seconds",
    "stored": "stored, MB",
}


@dataclass
class Row:
    """A strategy (or gold) after a request: values by measure, one a seed; `gold` are the same of gold."""

    case: Case
    pipeline: str
    strategy: str
    forgotten: tuple[int, ...]
    after: int
    values: dict[str, list[float]]
    gold: dict[str, list[float]]

    def mean(self, measure: str) -> float:
        """Over seeds."""
        return statistics.fmean(self.values[measure]) if self.values.get(measure) else nan

    def sd(self, measure: str) -> float:
        """Over seeds; nan for fewer than two."""
        return statistics.stdev(self.values[measure]) if len(self.values.get(measure, [])) > 1 else nan

    def distance(self, measure: str) -> float:
        """Mean over seeds of |value - gold's|; of gold, that between models of two seeds (nan for one seed)."""
        ours, gold = self.values.get(measure, []), self.gold.get(measure, [])
        pairs = list(combinations(gold, 2) if self.strategy == "gold" else zip(ours, gold, strict=False))
        return statistics.fmean(abs(a - b) for a, b in pairs) if pairs else nan


def measures(row: dict[str, Any], left: Sequence[int], sizes: Sequence[int]) -> dict[str, float]:
    """The columns of one scored model: means over the forgotten clients' examples."""
    total = sum(sizes[client] for client in left)

    def of(kind: str) -> float:
        return sum(sizes[client] * row[f"{kind}_{client}"] for client in left) / total

    found = {"forgotten": of("client"), "gap": of("client") - of("unseen")}
    found |= {"others": row["others"], "test": row["test"], "mia": row["mia"]}
    worst = max(abs(row[f"client_{client}"] - row[f"unseen_{client}"]) for client in left)
    return found | {"id": row["id_others"] if "id_client_" + str(left[0]) in row else nan, "worst": worst}


class Results:
    """Reads the results of a plan's steps, as far as they are there."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.sizes = [len(owned) for owned in plan.lab.slices]
        self._cache: dict[str, dict[str, Any]] = {}

    def of(self, step: Step) -> dict[str, Any] | None:
        """A step's result, if it is done."""
        if step.key not in self._cache and step.is_done(self.root):
            self._cache[step.key] = step.result(self.root)
        return self._cache.get(step.key)

    def scored(self, step: Step, round_: int, left: Sequence[int]) -> dict[str, float] | None:
        """The measures of a run after a round, when those had left."""
        for row in (self.of(step) or {"scores": []})["scores"]:
            if row["round"] == round_ and row["forgotten"] == sorted(left) and "mia" in row:
                return measures(row, left, self.sizes)
        return None

    def rows(self, case: Case, pipeline: str) -> list[Row]:
        """Every strategy, and gold, at every offset of a case."""
        found = []
        for offset, _ in case.requests:
            left = case.left(offset)
            for after in self.plan.settings.study.after:
                for strategy in [*self.plan.settings.study.strategies, "gold"]:
                    row = self._row(case, pipeline, strategy, left, offset, after)
                    if row.values:
                        found.append(row)
        return found

    def _row(self, case: Case, pipeline: str, strategy: str, left: tuple[int, ...], offset: int, after: int) -> Row:
        row = Row(case, pipeline, strategy, left, after, {}, {})
        for seed in self.plan.settings.study.seeds:
            gold_step = self.plan.gold(pipeline, left, seed)
            step = gold_step if strategy == "gold" else self.plan.forget(strategy, pipeline, case, seed)
            round_ = case.round + offset + after
            ours, gold = self.scored(step, round_, left), self.scored(gold_step, round_, left)
            for store, values in ((row.values, ours), (row.gold, gold)):
                for measure, value in (values or {}).items() if ours and gold else ():
                    if not isnan(value):
                        store.setdefault(measure, []).append(value)
        return row

    def before(self, case: Case, pipeline: str) -> list[dict[str, float]]:
        """What was measured of the base just before the request, by seed."""
        study, found = self.plan.settings.study, {}
        for seed, strategy in product(study.seeds, study.strategies):
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            if result:
                found[seed] = next(row for row in result["scores"] if row["request"] == "before")
        return [*found.values()]

    def foretold(self, case: Case, pipeline: str) -> list[float]:
        """Gold's accuracy on the first request's clients, as foretold when they asked, by seed."""
        study, found = self.plan.settings.study, {}
        for seed, strategy in product(study.seeds, study.strategies):
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            if result and "predicted" in result["forgets"][0]:
                found[seed] = result["forgets"][0]["predicted"]
        return [*found.values()]

    def costs(self, case: Case, pipeline: str, strategy: str) -> dict[str, list[float]]:
        """What the first request took until the model was served again, by seed."""
        found: dict[str, list[float]] = {}
        for seed in self.plan.settings.study.seeds:
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            gold = self.of(self.plan.gold(pipeline, case.left(0), seed))
            if not (result and gold):
                continue
            sweeps = result["forgets"][0]["costs"]
            again = sum(cost["work"] for round_, cost in gold["rounds"].items() if int(round_) <= case.round)
            of_training = ("recovery", "retained", "replay")
            values = {
                "work": 100 * sum(cost["work"] for cost in sweeps.values()) / again,
                "rounds": sum(cost.get("sweeps", 1) for name, cost in sweeps.items() if name in of_training),
                "bytes": sum(cost["bytes"] for cost in sweeps.values()) / 1e6,
                "seconds": result["forgets"][0]["seconds"],
                "stored": result["forgets"][0]["stored_bytes"] / 1e6,
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return found


def number(value: float, measure: str) -> str:
    """As it is printed."""
    if isnan(value):
        return "–"
    return f"{value:.1f}" if measure in ("mia", *COSTS) else f"{value:.3f}"


def title(case: Case, pipeline: str) -> str:
    """What a table is of."""
    asked = "; ".join(f"client{'s' if len(c) > 1 else ''} {' and '.join(map(str, c))}" for _, c in case.requests)
    apart = f", {case.requests[1][0]} rounds apart" if len(case.requests) > 1 else ""
    return f"{PIPELINES[pipeline]}: {asked}{apart}, asked for after round {case.round}"
