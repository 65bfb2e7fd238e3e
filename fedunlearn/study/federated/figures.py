"""Pictures of a federated study: accuracy over rounds, and distance to the retrained model against cost."""

import statistics
from collections.abc import Mapping
from math import isnan
from typing import TYPE_CHECKING

from fedunlearn.federation.strategy import strategy_class
from fedunlearn.runs.page import SOFT, drawing
from fedunlearn.study.dag.settings import Pipeline
from fedunlearn.study.federated.plan import Case
from fedunlearn.study.federated.settings import STRATEGIES
from fedunlearn.study.federated.tables import RETRAINED, Results, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORY = ("subset", "ssd", "leave")
BEFORE = 15  # rounds that are shown before the request
GREY = SOFT  # of the retrained model


def story(results: Results, case: Case, pipeline: Pipeline) -> "Figure":
    """Draw forget, retain and test accuracy over rounds.

    It shows a few strategies and whatever is not among the study's usual ones; the retrained model is dashed.
    """
    with drawing():
        return _story(results, case, pipeline)


def _story(results: Results, case: Case, pipeline: Pipeline) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    first = {f"client_{client}": results.sizes[client] for client in case.forgotten(0)}
    panels = {"forget": first, "retain": {"retain": 1}, "test": {"test": 1}}
    shown = [s for s in results.plan.settings.study.strategies if s in STORY or s not in STRATEGIES]
    for axes, (name, columns) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        axes.axvline(case.round, color=GREY, linewidth=1)
        axes.annotate(" request", (case.round, 0.02), ha="left", fontsize=8, color=GREY)
        for strategy in shown:
            points = curve(results, case, pipeline, strategy, columns)
            if points:
                colour = strategy_class(strategy).colour
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=label(strategy))
        points = curve(results, case, pipeline, RETRAINED, columns)
        if points:
            axes.plot(*zip(*points, strict=True), color=GREY, linestyle="--", label=label(RETRAINED))
        axes.set(title=name, xlabel="round", ylim=(0, 1.03), xlim=(max(0, case.round - BEFORE), None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.5, linewidth=0.6)
    figure.axes[0].set_ylabel("class accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def curve(
    results: Results, case: Case, pipeline: Pipeline, strategy: str, columns: Mapping[str, int]
) -> list[tuple[float, float]]:
    """Give (round, mean over seeds); a strategy's begins with its base, before the request.

    Args:
        columns: whose mean is drawn, with their weights.
    """
    values: dict[tuple[int, int], list[float]] = {}
    plan, first, total = results.plan, 0, sum(columns.values())
    for seed in plan.settings.study.seeds:
        if strategy == RETRAINED:
            task, first = plan.retrained(pipeline, case.forgotten(0), seed), min(plan.request_rounds())
        else:
            task = plan.forget(strategy, pipeline, case, seed)
        for row in results.scores(task):
            if columns.keys() <= row.keys() and row["round"] >= first:
                value = sum(row[name] * weight for name, weight in columns.items()) / total
                values.setdefault((row["round"], len(row["forgotten"])), []).append(value)
    return [(round_, statistics.fmean(found)) for (round_, _), found in sorted(values.items())]


def frontier(results: Results, case: Case, pipeline: Pipeline) -> "Figure":
    """Draw |forget − retrained| when the request is applied and at the end, against what unlearning costs.

    The dashed line is the distance between retrained models of two seeds.
    """
    with drawing():
        return _frontier(results, case, pipeline)


def _frontier(results: Results, case: Case, pipeline: Pipeline) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    after, dearest = results.plan.settings.study.after, 0.0
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, rounds in zip(panels, (min(after), max(after)), strict=True):
        for row in results.rows(case, pipeline):
            if (row.after, row.forgotten) != (rounds, case.forgotten(0)):
                continue
            distance = row.distance("forget")
            if row.strategy != RETRAINED:
                cost = statistics.fmean(results.costs(case, pipeline, row.strategy)["work"])
                dearest, drawn = max(dearest, cost), strategy_class(row.strategy)
                text = f"{label(row.strategy)}: retain {row.mean('retain'):.2f}, test {row.mean('test'):.2f}"
                looks = {"color": drawn.colour, "mfc": "none", "clip_on": False, "zorder": 3}
                axes.plot(cost, distance, drawn.marker, label=text, **looks)
            elif not isnan(distance):
                axes.axhline(distance, color=GREY, linestyle="--", label="retrained with another seed")
        axes.set(title=f"{rounds} rounds after", xlabel="work until applied, % of retraining")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes.grid(alpha=0.5, linewidth=0.6)
    # limits of shared axes come last: those that are set before a panel is drawn do not grow with it
    panels[0].set(ylim=(0, None), ylabel="|forget − retrained|")
    for axes in panels:
        axes.set_xscale("symlog", linthresh=1)
    ticks = [0, 1, 5, 20, 100]
    panels[0].set_xlim(-0.2, max(100, 1.3 * dearest))
    panels[0].set_xticks(ticks, [str(tick) for tick in ticks])
    return figure
