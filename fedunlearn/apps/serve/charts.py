"""Curves as numbers that a template draws: a few lines of SVG, which cost nothing beside a round of training."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite
from typing import NamedTuple

MOST_POINTS = 400  # of a curve: more than a screen shows
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 360, 200, 34, 18, 22  # of a picture, in its own units
Points = Sequence[tuple[int, float]]


class Line(NamedTuple):
    """One curve: its name, its place among the colours, where it goes, and its last value."""

    name: str
    colour: int
    points: str
    last: str


class Mark(NamedTuple):
    """A word at a place: of an axis, or of a request."""

    at: float
    text: str


class Chart(NamedTuple):
    """A picture of curves over the rounds."""

    title: str
    lines: list[Line]
    rounds: list[Mark]
    values: list[Mark]
    requests: list[Mark]

    @property
    def in_words(self) -> str:
        """Say what the picture shows."""
        return f"{self.title} over the rounds. Last: {', '.join(f'{line.name} {line.last}' for line in self.lines)}"


def chart(
    title: str,
    curves: Mapping[str, Points],
    *,
    rounds: int,
    top: float = 0.0,
    colours: Mapping[str, int] | None = None,
    requests: Mapping[int, str] | None = None,
) -> Chart:
    """Lay curves out.

    Args:
        title: what they are of.
        curves: by name, (round, value); what is no number is left out.
        rounds: of the whole run: so wide is the picture.
        top: of the value axis; 0 takes the largest value.
        colours: by name; others count on.
        requests: by round, what was asked after it.
    """
    drawn = {name: [(r, v) for r, v in points if isfinite(v)] for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    rounds = max([rounds, 1, *(r for points in drawn.values() for r, _ in points)])
    top = top or max((v for points in drawn.values() for _, v in points), default=1.0) or 1.0
    lines = [
        Line(
            name,
            (colours or {}).get(name, place),
            " ".join(f"{_x(r, rounds):.1f},{_y(v, top):.1f}" for r, v in thinned(points)),
            f"{points[-1][1]:.3f}",
        )
        for place, (name, points) in enumerate(drawn.items())
    ]
    asked = [Mark(_x(r, rounds), text) for r, text in (requests or {}).items()]
    shown = sorted({0, rounds // 2, rounds})
    values = [Mark(_y(part * top, top), f"{part * top:.2g}") for part in (0, 0.5, 1)]
    return Chart(title, lines, [Mark(_x(r, rounds), str(r)) for r in shown], values, asked)


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Leave points out where there are more than `most`: of neighbours the lowest and the highest stay.

    Example:
        >>> thinned([(1, 0.5), (2, 0.9), (3, 0.4), (4, 0.5), (5, 0.6), (6, 0.7)], most=4)
        [(2, 0.9), (3, 0.4), (4, 0.5), (6, 0.7)]
    """
    if len(points) <= most:
        return points
    size = ceil(len(points) / (most // 2))
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [point for group in groups for point in sorted({min(group, key=_value), max(group, key=_value)})]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _x(round_: int, rounds: int) -> float:
    return LEFT + (WIDTH - LEFT - 10) * round_ / rounds


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value, 0), top) / top
