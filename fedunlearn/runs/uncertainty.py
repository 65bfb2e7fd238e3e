"""How far a measured accuracy may be off because it is of so many images and not of all."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, isnan, sqrt
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Pairs a measured number with its standard error.

    Example:
        >>> print(Estimate(0.25, 0.0125))
        0.250 ± 0.013
    """

    value: float
    error: float

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 3, *, signed: bool = False) -> str:
        """Write it as people read it, with a sign where it is a difference."""
        number = f"{self.value:{'+' if signed else ''}.{digits}f}".replace("-", "−")
        return f"{number} ± {self.error:.{digits}f}"

    def short(self, *, signed: bool = False) -> str:
        """Write it for a sentence: two digits, or three where the error is smaller than that."""
        return self.text(2 if self.error >= 0.005 else 3, signed=signed)

    @property
    def is_above_zero(self) -> bool:
        """Say whether it is more than two standard errors above 0."""
        return self.value > 2 * self.error

    @property
    def is_below_zero(self) -> bool:
        """Say whether it is more than two standard errors below 0."""
        return self.value < -2 * self.error

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.value - other.value, hypot(self.error, other.error))


def fraction(p: float, n: float) -> Estimate:
    """Estimate a fraction from n images: sqrt(p (1 - p) / n).

    Where all or none are right the formula would give 0. It is then taken as if half an image were the other way.

    Args:
        p: fraction of the images, 0..1.
        n: images; may be an effective number.

    Example:
        >>> print(fraction(0.5, 100))
        0.500 ± 0.050
    """
    inside = min(max(p, 0.5 / n), 1 - 0.5 / n) if n > 1 else 0.5
    return Estimate(p, sqrt(inside * (1 - inside) / max(n, 1)))


def fall(before: np.ndarray, after: np.ndarray) -> Estimate:
    """Estimate how much accuracy falls from one model to another, on the same images.

    Most images are right for both models or wrong for both, and say nothing. So the error is smaller than that of two
    sets of images. It is the standard error of the mean of +1 (right before alone), -1 (right after alone) and 0.

    Args:
        before, after: which images are right, bool [n].

    Example:
        >>> print(fall(np.array([True, True, True, True]), np.array([True, True, False, False])))
        0.500 ± 0.250
    """
    falls = before.astype(float) - after.astype(float)
    return Estimate(float(falls.mean()), float(falls.std() / sqrt(max(1, len(falls)))))


def held_out(p: float, test_examples: int, class_counts: np.ndarray | None) -> Estimate:
    """Estimate what held-out images of some class counts get.

    Images of one class weigh more or less than they are among the held-out ones, so that fewer of them count: n /
    (K sum_k w_k^2) for the fractions w of the class counts, as if every class had as many held-out images.

    Args:
        p: the accuracy, 0..1.
        test_examples: n, held-out images of all classes.
        class_counts: images of each class, [K]; None where nobody knows them, and then all n count.
    """
    if class_counts is None or not class_counts.sum():
        return fraction(p, test_examples)
    weights = class_counts / class_counts.sum()
    return fraction(p, test_examples / (len(weights) * float((weights**2).sum())))


def memorisation_gap(
    forgotten: Mapping[str, Mapping[str, Any]], test_examples: int, class_counts: np.ndarray | None = None
) -> Estimate | None:
    """Estimate how much better a model knows clients' images than held-out images of their class counts.

    Args:
        forgotten: scores of clients by number, as `Scorer` gives them; their means are over images.
        test_examples: held-out images of all classes.
        class_counts: images of every client by class, [C, K], where an auditor knows them.

    Returns:
        None where it was not measured.
    """
    known = {c: s for c, s in forgotten.items() if s["examples"] and not isnan(s.get("held_out", float("nan")))}
    total = sum(scores["examples"] for scores in known.values())
    if not total or not test_examples:
        return None
    parts = [(s["examples"] / total, s, fraction(s["class"], s["examples"])) for s in known.values()]
    own = Estimate(sum(w * e.value for w, _, e in parts), hypot(*(w * e.error for w, _, e in parts)))
    counts = None if class_counts is None else class_counts[[int(client) for client in known]].sum(0)
    return own - held_out(sum(w * s["held_out"] for w, s, _ in parts), test_examples, counts)
