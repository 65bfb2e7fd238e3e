"""The pictures of the paper's study."""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedunlearn.runs.figures import COLOURS, split_figure
from fedunlearn.study.dag.settings import PIPELINES, Pipeline
from fedunlearn.study.dag.tasks import Task
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.search import read_trials
from fedunlearn.study.pooled.sparsity import METHODS
from fedunlearn.study.pooled.unlearning import TRIALS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAST = "last forgotten client"


def all_figures(plan: Plan, root: Path) -> dict[str, tuple[str, "Figure"]]:
    """Draw what has been measured so far; gives caption and figure by file name."""
    figures = {
        "split": ("Training images by client and class (the paper's Figures 4 and 5)", split(plan)),
        "diagram": ("The pipeline (the paper's Figure 3)", diagram()),
    }
    for name, caption, made in (
        ("stages", "Accuracy and MIA accuracy by stage; bars: standard deviation over seeds", stages(plan, root)),
        ("search", "Every trial of the searches of stage 1 (first seed); circled: chosen", landscape(plan, root)),
        (
            "pruning",
            "Client-ID accuracy of the retain clients by epoch of fine-tuning after pruning",
            curves(plan, root),
        ),
        ("embeddings", "t-SNE of embeddings, by class and by client (the paper's Figure 2)", embeddings(plan, root)),
        ("learning", "Accuracy on training images as they were trained on (first seed)", learning(plan, root)),
    ):
        if made is not None:
            figures[name] = (caption, made)
    return figures


def split(plan: Plan) -> "Figure":
    """Draw a heat map of examples, clients x classes (Figures 4 and 5)."""
    workspace = plan.workspace
    counts = np.stack([workspace.class_counts(client).numpy() for client in range(plan.settings.clients)])
    return split_figure(counts, workspace.dataset.class_names)


def diagram() -> "Figure":
    """Draw what happens to a model, as boxes (Figure 3)."""
    figure = _figure(10, 3.4)
    axes = figure.subplots()
    boxes = [
        (0.1, 1.1, 1.5, 1.2, "images of\nall clients", "#e8eef2"),
        (2.1, 1.1, 1.6, 1.2, "ResNet-18\nembedding z", "#d7e3ea"),
        (4.2, 2.1, 1.7, 0.9, "class head\nCE", "#dcead2"),
        (4.2, 0.4, 1.7, 0.9, "client head\nCE, z: DL", "#f6e3c9"),
        (6.7, 2.1, 1.9, 0.9, "SSD: dampen by\n$F_{D_f}$ against $F_D$", "#f3d3cb"),
        (6.7, 0.4, 1.9, 0.9, "prune the client's\noutput neuron", "#f3d3cb"),
        (9.3, 1.1, 1.6, 1.2, "fine-tune\n(optional)", "#e6dcf0"),
    ]
    for x, y, width, height, text, colour in boxes:
        axes.add_patch(_box(x, y, width, height, colour))
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)
    for start, end in (
        ((1.6, 1.7), (2.1, 1.7)), ((3.7, 1.9), (4.2, 2.5)), ((3.7, 1.5), (4.2, 0.9)), ((5.9, 2.55), (6.7, 2.55)),
        ((7.65, 2.1), (7.65, 1.3)), ((8.6, 0.9), (9.3, 1.4)),
    ):  # fmt: skip
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.3"})
    axes.annotate(
        "next request", (7.65, 3.0), (10.1, 2.35), ha="center", fontsize=8, color="0.3",
        arrowprops={"arrowstyle": "-|>", "color": "0.3", "connectionstyle": "angle3,angleA=90,angleB=0"},
    )  # fmt: skip
    axes.set(xlim=(0, 11), ylim=(0, 3.4))
    axes.axis("off")
    return figure


def stages(plan: Plan, root: Path) -> "Figure | None":
    """Draw accuracies by stage: of the last forgotten client, the retain clients, the test set and the attack."""
    columns = (LAST, "retain", "test", "mia")
    figure = _figure(11, 2.3 * len(PIPELINES))
    grid = figure.subplots(len(PIPELINES), len(columns), squeeze=False, sharex=True)
    drawn = False
    for row, (pipeline, label) in zip(grid, PIPELINES.items(), strict=True):
        for place, (name, colour) in enumerate(
            zip(("original", "unlearned", "fine-tuned", "retrained"), COLOURS, strict=False)
        ):
            for axes, column in zip(row, columns, strict=True):
                points = _stage_points(plan, root, pipeline, name, column)
                if points:
                    drawn = True
                    x = [stage + 0.05 * (place - 1.5) for stage, _ in points]
                    y, sd = [np.mean(v) for _, v in points], [np.std(v, ddof=len(v) > 1) for _, v in points]
                    axes.errorbar(x, y, sd, label=name, color=colour, marker="o", markersize=4, capsize=2)
                axes.set_title(f"{label}: {column if column != 'mia' else 'MIA accuracy, %'}", fontsize=9)
                axes.set_xticks(range(1, len(plan.order) + 1))
                axes.grid(alpha=0.25)
    for axes in grid[-1]:
        axes.set_xlabel("stage")
    if not drawn:
        return None
    figure.legend(*_first_legend(grid), fontsize=8, loc="outside upper center", ncols=4)
    return figure


def landscape(plan: Plan, root: Path) -> "Figure | None":
    """Draw the objective, and what it costs the retain clients, over alpha and lambda."""
    seed = plan.settings.study.seeds[0]
    every: dict[Pipeline, Task] = {p: plan.ssd(p, 1, seed) for p in plan.settings.study.pipelines}
    tasks: dict[Pipeline, Task] = {pipeline: task for pipeline, task in every.items() if task.is_done(root)}
    if not tasks:
        return None
    figure = _figure(4 * len(tasks), 6.4)
    name = "alpha" if plan.settings.search.reading == "threshold" else "exponent"
    grid = figure.subplots(2, len(tasks), squeeze=False).T
    for column, (pipeline, task) in zip(grid, tasks.items(), strict=True):
        trials, best = read_trials(task.folder(root) / TRIALS), task.result(root)["best"]
        x, y = ([trial[key] for trial in trials] for key in (name, "lambda_"))
        for axes, colours, label in (
            (column[0], [trial["value"] for trial in trials], "deviation from retrained"),
            (column[1], [1 - trial["scores"]["retain"] for trial in trials], "retain class error"),
        ):
            drawn = axes.scatter(x, y, c=colours, cmap="viridis_r")
            axes.scatter(best[name], best["lambda_"], s=140, facecolors="none", edgecolors="#c8553d", linewidths=2)
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel="lambda", title=PIPELINES[pipeline])
            figure.colorbar(drawn, ax=axes, label=label)
    return figure


def curves(plan: Plan, root: Path) -> "Figure | None":
    """Draw client-ID accuracy by epoch after pruning."""
    settings, seeds = plan.settings.ablation, plan.settings.study.seeds
    tasks = [task for task in plan.ablation() if task.name.startswith("prune/") and task.is_done(root)]
    rows = [task for task in tasks if task.name.endswith(f"/seed{seeds[0]}")]
    if not rows:
        return None
    figure, base = _figure(11, 3.4), plan.base(settings.pipeline, seeds[0])
    colours = dict(zip(settings.fractions, cycle(COLOURS), strict=False))
    for axes, method in zip(figure.subplots(1, len(METHODS), sharey=True), METHODS, strict=True):
        for task in rows:
            about, curve = task.settings, task.result(root)["curve"]
            if about["method"] == method:
                label = f"{about['fraction']:g}, heads {'tuned' if about['heads'] else 'fixed'}"
                style, colour = "-" if about["heads"] else "--", colours[about["fraction"]]
                axes.plot([scores["id_retain"] for scores in curve], style, label=label, color=colour, marker=".")
        before = base.result(root)["learning"]["id_retain"]
        axes.axhline(before, color="0.5", linewidth=1, label="before pruning")
        axes.set(xlabel="epoch of fine-tuning", ylim=(0, 1.02), title=method)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    return figure


def embeddings(plan: Plan, root: Path) -> "Figure | None":
    """Draw every view, by class above and by client below."""
    tasks = [task for task in plan.pictures() if task.is_done(root)]
    titles = ["before", *(f"stage {stage}" for stage in range(1, len(plan.order) + 1))]
    views = []
    for result in (task.result(root) for task in tasks):
        own = titles if len(result["views"]) > 1 else [result["views"][0]["name"]]
        views += [(title, view, result) for title, view in zip(own, result["views"], strict=True)]
    if not views:
        return None
    figure = _figure(3 * len(views), 6.4)
    grid = figure.subplots(2, len(views), squeeze=False)
    for column, (title, view, result) in enumerate(views):
        points = np.array(view["points"])
        for axes, key in zip(grid[:, column], ("classes", "clients"), strict=True):
            axes.scatter(*points.T, c=result[key], cmap="tab10", s=3, rasterized=True)
            axes.set_title(f"{title}, by {key}", fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
    return figure


def learning(plan: Plan, root: Path) -> "Figure | None":
    """Draw class and client-ID accuracy by epoch."""
    seed = plan.settings.study.seeds[0]
    tasks: dict[Pipeline, Task] = {p: plan.base(p, seed) for p in plan.settings.study.pipelines}
    histories: dict[Pipeline, np.ndarray] = {
        p: np.array(task.result(root)["history"]) for p, task in tasks.items() if task.is_done(root)
    }
    if not histories:
        return None
    figure = _figure(8, 3)
    for axes, (title, column) in zip(figure.subplots(1, 2), (("class", 1), ("client ID", 2)), strict=True):
        for (pipeline, history), colour in zip(histories.items(), COLOURS, strict=False):
            axes.plot(range(1, len(history) + 1), history[:, column], label=PIPELINES[pipeline], color=colour)
        axes.set(xlabel="epoch", ylabel=f"{title} accuracy", ylim=(0, 1.02))
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def _stage_points(plan: Plan, root: Path, pipeline: Pipeline, name: str, column: str) -> list[tuple[int, list[float]]]:
    """Give (stage, values over seeds)."""
    if pipeline not in plan.settings.study.pipelines:
        return []
    points = []
    for stage, client in enumerate(plan.order, 1):
        key, values = f"client_{client}" if column == LAST else column, []
        for seed in plan.settings.study.seeds:
            task, place = _model(plan, name, pipeline, stage, seed)
            if task.is_done(root):
                values.append(task.result(root)["scores"][place][key])
        if values:
            points.append((stage, values))
    return points


def _model(plan: Plan, name: str, pipeline: Pipeline, stage: int, seed: int) -> tuple[Task, int]:
    """Give the task that scored a model, and the place of the stage among its scores."""
    if name == "original":
        return plan.base(pipeline, seed), stage - 1
    made = {"unlearned": plan.ssd, "fine-tuned": plan.finetune, "retrained": plan.retrained}[name]
    return made(pipeline, stage, seed), 0


def _first_legend(grid: np.ndarray) -> tuple[list, list]:
    return next(legend for axes in grid.flat if (legend := axes.get_legend_handles_labels())[0])


def _box(x: float, y: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.1", fc=colour, ec="0.4")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
