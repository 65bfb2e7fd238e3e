"""What a federated study has measured: one row for each strategy and time of measurement, mean over seeds.

Each is beside the same of the retrained model (the paper's "gold").
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from math import isnan, nan, sqrt
from pathlib import Path
from typing import Any, Literal

from scipy.stats import t as student

from fedunlearn.federation.strategy import strategy_class
from fedunlearn.federation.tasks import tasks_of
from fedunlearn.study.dag.settings import PIPELINES, Pipeline
from fedunlearn.study.dag.tasks import Task
from fedunlearn.study.federated.plan import Case, Plan

RETRAINED = "retrained"  # in place of a strategy's name
LEAST_GAP = 0.05  # that a request must have closed for a part of it to be able to come back

MEASURES = {
    "forget": "forget",
    "gap": "memorisation gap",
    "retain": "retain",
    "test": "test",
    "id": "client ID, retain",
    "mia": "MIA accuracy, %",
}
COSTS = {
    "work": "work, % of retraining",
    "rounds": "rounds until applied",
    "bytes": "MB",
    "seconds": "seconds",
    "stored": "stored, MB",
}


def label(strategy: str) -> str:
    """Say what tables and pictures call a strategy, or the retrained model."""
    return RETRAINED if strategy == RETRAINED else strategy_class(strategy).label


@dataclass
class Row:
    """A strategy (or the retrained model) some rounds after a request.

    Attributes:
        forgotten: the clients, in the order of their requests.
        after: rounds since the last of these requests.
        values: by measure, one a seed.
        retrained: the same of the retrained model.
        models: the same of all retrained models, whatever the strategy has done.
    """

    case: Case
    pipeline: Pipeline
    strategy: str
    forgotten: tuple[int, ...]
    after: int
    values: dict[str, list[float]]
    retrained: dict[str, list[float]]
    models: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, measure: str) -> float:
        """Give the mean over seeds."""
        return statistics.fmean(self.values[measure]) if self.values.get(measure) else nan

    def sd(self, measure: str) -> float:
        """Give the standard deviation over seeds; nan for fewer than two."""
        return statistics.stdev(self.values[measure]) if len(self.values.get(measure, [])) > 1 else nan

    def distance(self, measure: str) -> float:
        """Give the mean over seeds of |value - the retrained model's|.

        Of the retrained model itself it is that between models of two seeds (nan for one seed).
        """
        pairs = combinations(self.models.get(measure, []), 2) if self.strategy == RETRAINED else self.pairs(measure)
        apart = [abs(a - b) for a, b in pairs]
        return statistics.fmean(apart) if apart else nan

    def difference(self, measure: str) -> float:
        """Give the mean over seeds of the value less the retrained model's; nan where nothing was measured."""
        apart = [ours - retrained for ours, retrained in self.pairs(measure)]
        return statistics.fmean(apart) if apart else nan

    def pairs(self, measure: str) -> list[tuple[float, float]]:
        """Pair the values with the retrained model's, seed by seed."""
        return [*zip(self.values.get(measure, []), self.retrained.get(measure, []), strict=False)]


def reach(rows: Iterable[Row], measure: str) -> float:
    """Give the distance within which 95 of 100 pairs of retrained models are, whatever any strategy does.

    It is t sqrt(2 s^2), with s^2 the variance over retrained models of one request at one time, pooled over requests
    and times, and t the 97.5 % quantile of Student's distribution with as many degrees of freedom as s^2 has. Times
    count as if they were independent. They are not quite, so that the distance is rather too small than too large.

    Args:
        rows: of any strategies; nan where no request has two retrained models.
    """
    models = {(row.forgotten, row.after): row.models.get(measure, []) for row in rows}
    groups = [values for values in models.values() if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    if not freedom:
        return nan
    pooled = sum((len(values) - 1) * statistics.variance(values) for values in groups) / freedom
    return float(student.ppf(0.975, freedom)) * sqrt(2 * pooled)


def gap_of(row: dict[str, Any], forgotten: Sequence[int], sizes: Sequence[int]) -> float:
    """Give the memorisation gap of a measured model: the mean over the forgotten clients' examples."""
    apart = [sizes[c] * (row[f"client_{c}"] - row[f"held_out_{c}"]) for c in forgotten]
    return sum(apart) / sum(sizes[c] for c in forgotten)


def measures(row: dict[str, Any], forgotten: Sequence[int], sizes: Sequence[int]) -> dict[str, float]:
    """Give the measures of one scored model: means over the forgotten clients' examples."""
    total = sum(sizes[client] for client in forgotten)

    def of(kind: str) -> float:
        return sum(sizes[client] * row[f"{kind}_{client}"] for client in forgotten) / total

    found = {"forget": of("client"), "gap": gap_of(row, forgotten, sizes)}
    found |= {"retain": row["retain"], "test": row["test"], "mia": row["mia"]}
    worst = max(abs(row[f"client_{client}"] - row[f"held_out_{client}"]) for client in forgotten)
    return found | {"id": row["id_retain"] if f"id_client_{forgotten[0]}" in row else nan, "worst": worst}


class Results:
    """Reads the results of a plan's tasks, as far as they are there."""

    def __init__(self, plan: Plan, root: Path) -> None:
        self.plan, self.root = plan, root
        self.sizes = [len(owned) for owned in plan.workspace.slices]
        self._cache: dict[str, dict[str, Any]] = {}

    def of(self, task: Task) -> dict[str, Any] | None:
        """Read a task's result, if it is done."""
        if task.key not in self._cache and task.is_done(self.root):
            self._cache[task.key] = task.result(self.root)
        return self._cache.get(task.key)

    def scores(self, task: Task) -> list[dict[str, Any]]:
        """Give what was measured of a task's run, a row a time; nothing where it is not done."""
        return (self.of(task) or {"scores": []})["scores"]

    def scored(self, task: Task, round_: int, forgotten: Sequence[int]) -> dict[str, float] | None:
        """Give the measures of a run after a round in which those clients are forgotten."""
        for row in self.scores(task):
            if row["round"] == round_ and row["forgotten"] == sorted(forgotten) and "mia" in row:
                return measures(row, forgotten, self.sizes)
        return None

    def rows(self, case: Case, pipeline: Pipeline) -> list[Row]:
        """Give the rows of every strategy, and of the retrained model, at every offset of a case."""
        found = []
        for offset, _ in case.requests:
            for after in self.plan.settings.study.after:
                for strategy in [*self.plan.settings.study.strategies, RETRAINED]:
                    row = self._row(case, pipeline, strategy, offset, after)
                    if row.values:
                        found.append(row)
        return found

    def _row(self, case: Case, pipeline: Pipeline, strategy: str, offset: int, after: int) -> Row:
        forgotten, round_ = case.forgotten(offset), case.round + offset + after
        row = Row(case, pipeline, strategy, forgotten, after, {}, {})
        for seed in self.plan.settings.study.seeds:
            retrained = self.plan.retrained(pipeline, forgotten, seed)
            task = retrained if strategy == RETRAINED else self.plan.forget(strategy, pipeline, case, seed)
            ours, target = self.scored(task, round_, forgotten), self.scored(retrained, round_, forgotten)
            for store, values in ((row.values, ours), (row.retrained, target)):
                for measure, value in (values or {}).items() if ours and target else ():
                    if not isnan(value):
                        store.setdefault(measure, []).append(value)
        for seed in dict.fromkeys([*self.plan.settings.study.seeds, *self.plan.settings.study.retrained_seeds]):
            scores = self.scored(self.plan.retrained(pipeline, forgotten, seed), round_, forgotten)
            for measure, value in (scores or {}).items():
                row.models.setdefault(measure, []).append(value)
        return row

    def resurfaced(self, row: Row) -> list[float]:
        """Give how much of the memorisation gap has come back since a first request was applied, by seed.

        (gap_t - gap_0) / (gap_before - gap_0): 0 where the client stayed where it was put, 1 where it is as well known
        as before. Where less than `LEAST_GAP` was to be forgotten, nothing is said.
        """
        case, forgotten, found = row.case, row.forgotten, []
        if not row.after or row.strategy == RETRAINED or forgotten != case.forgotten(0):
            return []
        for seed in self.plan.settings.study.seeds:
            task = self.plan.forget(row.strategy, row.pipeline, case, seed)
            then, now = (self.scored(task, case.round + after, forgotten) for after in (0, row.after))
            if then and now:
                first = next(one for one in self.scores(task) if one["request"] == "before")
                before = gap_of(first, forgotten, self.sizes)
                if before - then["gap"] >= LEAST_GAP:
                    found.append((now["gap"] - then["gap"]) / (before - then["gap"]))
        return found

    def before(self, case: Case, pipeline: Pipeline) -> list[dict[str, float]]:
        """Give what was measured of the base just before the request, by seed."""
        study, found = self.plan.settings.study, {}
        for seed, strategy in product(study.seeds, study.strategies):
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            if result:
                found[seed] = next(row for row in result["scores"] if row["request"] == "before")
        return [*found.values()]

    def estimated(self, case: Case, pipeline: Pipeline) -> list[float]:
        """Give the retrained model's accuracy on the first request's clients, as estimated at the request, by seed."""
        study, found = self.plan.settings.study, {}
        for seed, strategy in product(study.seeds, study.strategies):
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            if result and "predicted" in result["forgets"][0]:
                found[seed] = result["forgets"][0]["predicted"]
        return [*found.values()]

    def costs(self, case: Case, pipeline: Pipeline, strategy: str) -> dict[str, list[float]]:
        """Give what the first request took until it was applied, by seed.

        Rounds are the queries of client tasks that train. Retraining takes as many rounds as there were before the
        request, each with the work of the median round after it. So both are of one machine, whatever made the
        retrained model. Without rounds after the request nobody knows (nan).
        """
        found: dict[str, list[float]] = {}
        tasks = tasks_of(strategy_class(strategy))
        for seed in self.plan.settings.study.seeds:
            result = self.of(self.plan.forget(strategy, pipeline, case, seed))
            if not result:
                continue
            costs = result["forgets"][0]["costs"]
            again = case.round * statistics.median(
                cost["work"] for cost in result["rounds"].values() or [{"work": nan}]
            )
            values = {
                "work": 100 * sum(cost["work"] for cost in costs.values()) / again,
                "rounds": sum(cost["queries"] for name, cost in costs.items() if tasks[name].trains),
                "bytes": sum(cost["bytes"] for cost in costs.values()) / 1e6,
                "seconds": result["forgets"][0]["seconds"],
                "stored": result["forgets"][0]["stored_bytes"] / 1e6,
            }
            for name, value in values.items():
                found.setdefault(name, []).append(value)
        return found


def number(value: float, measure: str, sign: Literal["", "+"] = "") -> str:
    """Write a value as it is printed, with `sign="+"` as a difference."""
    if isnan(value):
        return "–"
    return f"{value:{sign}.1f}" if measure in ("mia", *COSTS) else f"{value:{sign}.3f}"


def title(case: Case, pipeline: Pipeline) -> str:
    """Say what a table is of."""
    asked = "; ".join(f"client{'s' if len(c) > 1 else ''} {' and '.join(map(str, c))}" for _, c in case.requests)
    apart = f", {case.requests[1][0]} rounds apart" if len(case.requests) > 1 else ""
    return f"{PIPELINES[pipeline]}: {asked}{apart}, asked for after round {case.round}"
