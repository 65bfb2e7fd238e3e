"""Pictures of a federated study: the story over rounds, and distance to gold against cost."""

import statistics
from math import isnan
from typing import TYPE_CHECKING

from fedunlearn.study.federated.plan import Case
from fedunlearn.study.federated.tables import NAMES, Results, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORY = ("subset", "ssd", "leave")
BEFORE = 15  # rounds that are shown before the request
COLOURS = {
    "subset": "#2a6f97", "ssd": "#c8553d", "leave": "#6a994e", "ascent": "#e09f3e", "pga": "#7b2cbf",
    "federaser": "#bc4b8a", "negate": "#5c4033", "gold": "0.45",
}  # fmt: skip
MARKERS = dict(zip(NAMES, "osD^v<>*", strict=True))
OWN = (("black", "P"), ("tab:cyan", "X"), ("tab:olive", "d"), ("tab:pink", "p"))  # of somebody's own strategies


def story(results: Results, case: Case, pipeline: str) -> "Figure":
    """Forgotten, others and test over rounds for ours, SSD and leaving; gold as dashed lines, the request marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left = case.left(0)
    columns = {"forgotten": f"client_{left[0]}", "others": "others", "test": "test"}
    for axes, (name, column) in zip(figure.subplots(1, 3, sharey=True), columns.items(), strict=True):
        axes.axvline(case.round, color="0.6", linewidth=1)
        axes.annotate(" request", (case.round, 0.02), ha="left", fontsize=8, color="0.35")
        for strategy in (s for s in results.plan.settings.study.strategies if s in STORY or s not in NAMES):
            points = curve(results, case, pipeline, strategy, column)
            if points:
                colour, _ = style(results, strategy)
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3, label=label(strategy))
        gold = curve(results, case, pipeline, "gold", column)
        if gold:
            axes.plot(*zip(*gold, strict=True), color=COLOURS["gold"], linestyle="--", label=label("gold"))
        axes.set(title=name, xlabel="round", ylim=(0, 1.03), xlim=(case.round - BEFORE, None))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("class accuracy")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    return figure


def style(results: Results, strategy: str) -> tuple[str, str]:
    """Colour and marker of a strategy."""
    if strategy in NAMES:
        return COLOURS[strategy], MARKERS[strategy]
    own = [s for s in results.plan.settings.study.strategies if s not in NAMES]
    return OWN[own.index(strategy) % len(OWN)]


def curve(results: Results, case: Case, pipeline: str, strategy: str, column: str) -> list[tuple[float, float]]:
    """(round, mean over seeds) of a column; a strategy's begins with its base, before the request."""
    values: dict[tuple[int, bool], list[float]] = {}
    for seed in results.plan.settings.study.seeds:
        gold = strategy == "gold"
        step = (
            results.plan.gold(pipeline, case.left(0), seed)
            if gold
            else results.plan.forget(strategy, pipeline, case, seed)
        )
        for row in (results.of(step) or {"scores": []})["scores"]:
            if column in row and (not gold or row["round"] >= min(results.plan.moments())):
                values.setdefault((row["round"], bool(row["forgotten"])), []).append(row[column])
    return [(round_, statistics.fmean(found)) for (round_, _), found in sorted(values.items())]


def frontier(results: Results, case: Case, pipeline: str) -> "Figure":
    """|forgotten − gold| when served and at the end, against what unlearning costs; dashed: of gold of another seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    after = results.plan.settings.study.after
    moments = (min(after), max(after))
    for axes, moment in zip(figure.subplots(1, 2, sharey=True), moments, strict=True):
        for row in results.rows(case, pipeline):
            if (row.after, row.forgotten) != (moment, case.left(0)):
                continue
            distance = row.distance("forgotten")
            if row.strategy != "gold":
                cost = statistics.fmean(results.costs(case, pipeline, row.strategy)["work"])
                colour, marker = style(results, row.strategy)
                text = f"{label(row.strategy)}: others {row.mean('others'):.2f}, test {row.mean('test'):.2f}"
                axes.plot(cost, distance, marker, color=colour, mfc="none", label=text)
            elif not isnan(distance):
                axes.axhline(distance, color=COLOURS["gold"], linestyle="--", label="gold of another seed")
        axes.set(title=f"{moment} rounds after", xlabel="work until served, % of retraining", ylim=(0, None))
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(-0.2, 100)
        axes.set_xticks([0, 1, 5, 20, 100], ["0", "1", "5", "20", "100"])
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("|forgotten − gold|")
    return figure
