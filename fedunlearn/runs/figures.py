"""Figures of a run: accuracies over the rounds, and who has what."""

from collections.abc import Sequence
from itertools import cycle, pairwise
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedunlearn.naming import named
from fedunlearn.runs.page import INK, SOFT, drawing, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2a6f97", "#6a994e", "#c8553d", "#e09f3e", "#7b2cbf", "#bc4b8a", "#5c4033")
RETAIN, TEST, *OF_CLIENTS = COLOURS
MOST_DRAWN = 6  # forgotten clients in one figure
LETTER = 0.018  # about so much of a panel's width
FEW_ROUNDS = 40  # up to which every evaluated round is a dot


class Mark(NamedTuple):
    """A request in a figure: after which round, of which clients, and whether it failed."""

    round: int
    clients: list[int]
    failed: bool = False


def split_figure(counts: np.ndarray, class_names: list[str], clients: Sequence[str] = ()) -> "Figure":
    """Draw a heat map of examples, clients x classes (the paper's Figure 4).

    Args:
        counts: training images of each client by class, [C, K].
        class_names: K names.
        clients: names by number, if there are any; those beyond C, as of refused requests, are left out.
    """
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(6, 0.8 + 0.27 * min(len(counts), 40)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(counts, cmap="YlGnBu", aspect="auto")
        few = counts.size <= 400
        axes.set(xlabel="class", ylabel="client")
        names = [shortened(literal(name)) for name in class_names] if few else []
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        called = [shortened(literal(name)) for name in clients[: len(counts)]] if few and clients else None
        axes.set_yticks(range(len(counts)) if few else [], called)
        axes.spines[:].set_visible(False)
        if few:
            for (client, k), count in np.ndenumerate(counts):
                colour = "white" if count > counts.max() / 2 else "black"
                axes.text(k, client, str(int(count)), ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(image, label="training images").outline.set_visible(False)  # type: ignore[operator]
    return figure


def shortened(name: str, most: int = 24) -> str:
    """Cut a long name, so that it leaves room for the figure."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def accuracy_figure(
    rows: list[dict[str, Any]],
    asked: Sequence[Mark] = (),
    retrained: list[dict[str, Any]] | None = None,
    names: Sequence[str] = (),
) -> "Figure":
    """Draw class and client-ID accuracy over the rounds, of retain clients, forgotten ones and the test set.

    Of a forgotten client it also shows what held-out images of its class counts get, and the retrained model on it.

    Args:
        rows: of `metrics.jsonl`.
        asked: requests, each a vertical line.
        retrained: rows of the run in which the forgotten clients never took part.
        names: of all clients by number, where they have names.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with drawing():
        figure = Figure(figsize=(5, 5.2), layout="constrained")
        colours = {"retain clients": RETAIN, "test": TEST}
        of_clients = [who for who in curves(rows, "class", names) if who not in colours]
        colours |= dict(zip(of_clients, cycle(OF_CLIENTS), strict=False))
        panels = figure.subplots(2, 1, sharex=True)
        rounds = sorted({round_ for points in curves(rows, "class").values() for round_, _ in points})
        dots = {"marker": "o", "markersize": 3} if len(rounds) <= FEW_ROUNDS else {}
        for axes, measure in zip(panels, ("class", "client_id"), strict=True):
            for who, points in curves(rows, measure, names).items():
                axes.plot(*zip(*points, strict=True), label=who, color=colours[who], linewidth=1.5, **dots)
            axes.set(ylim=(-0.02, 1.02), ylabel=f"{measure.replace('_id', '-ID')} accuracy")
            axes.grid(alpha=0.5, linewidth=0.6)
        for who, points in curves(rows, "held_out", names).items():
            text = f"held-out, as {who}"
            panels[0].plot(*zip(*points, strict=True), label=text, color=colours[who], linewidth=1.2, linestyle="--")
        for who, points in curves(retrained or [], "class", names).items():
            if who in of_clients:
                text = f"{who}, retrained without it"
                panels[0].plot(*zip(*points, strict=True), label=text, color=INK, linewidth=1.2, linestyle=":", **dots)
        ends = [*rounds, *(mark.round for mark in asked)] or [0, 1]
        margin = max(0.5, 0.03 * (max(ends) - min(ends)))
        panels[1].set(xlabel="round", xlim=(min(ends) - margin, max(ends) + margin))
        panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _draw_marks(panels, asked, names)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def _draw_marks(panels: Sequence["Axes"], asked: Sequence[Mark], names: Sequence[str]) -> None:
    """Draw a line a round of requests through both panels, and say above the first whose they are."""
    low, high = panels[1].get_xlim()
    by_round: dict[int, list[Mark]] = {}
    for mark in sorted(asked, key=lambda mark: mark.round):
        by_round.setdefault(mark.round, []).append(mark)
    places = [(round_ - low) / (high - low) for round_ in by_round]
    texts = [_of_marks(there, names) for there in by_round.values()]
    widths = [LETTER * len(text) for text in texts]
    ends = zip(pairwise(places), pairwise(widths), strict=True)
    crowded = any(right - left < (one + other) / 2 for (left, right), (one, other) in ends)
    slanted = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"} if crowded else {}
    for (round_, there), text, place, width in zip(by_round.items(), texts, places, widths, strict=True):
        failed = all(mark.failed for mark in there)
        for axes in panels:
            axes.axvline(round_, color=OF_CLIENTS[0] if failed else SOFT, linewidth=1, linestyle=":" if failed else "-")
        side = slanted or {"ha": "left" if place < width / 2 else "right" if place > 1 - width / 2 else "center"}
        panels[0].annotate(
            text, (round_, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            va="bottom", fontsize=8.5, color=INK, annotation_clip=False, **side,
        )  # fmt: skip


def _of_marks(there: Sequence[Mark], names: Sequence[str]) -> str:
    """Say whose the requests of one round are."""
    clients = sorted({client for mark in there for client in mark.clients})
    whom = literal(named(clients, names)).partition(" ")[2]
    return f"forget {whom}{' failed' if all(mark.failed for mark in there) else ''}"


def curves(rows: list[dict[str, Any]], measure: str, names: Sequence[str] = ()) -> dict[str, list[tuple[int, float]]]:
    """(round, accuracy) of the retain clients, of the test set, and of the first clients that were forgotten."""
    asked = [str(client) for row in rows if row["kind"] == "forget" for client in row["clients"]][:MOST_DRAWN]
    curves: dict[str, list[tuple[int, float]]] = {}
    for round_, scores in (point for row in rows for point in _points(row)):
        groups = {"retain clients": scores["retain"]} | ({"test": scores["test"]} if measure == "class" else {})
        each = scores["retain_clients"] | scores["forgotten"]
        groups |= {literal(named([int(client)], names)): each[client] for client in asked if client in each}
        for who, accuracies in groups.items():
            if not isnan(accuracies.get(measure, float("nan"))):
                curves.setdefault(who, []).append((round_, accuracies[measure]))
    return curves


def _points(row: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    if row["kind"] == "forget":
        return [(row["round"], row["before"]), (row["completed_round"], row["after"])]
    return [(row["round"], row)] if "test" in row else []
