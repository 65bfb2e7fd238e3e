"""Means of updates that a few dishonest clients cannot turn.

Sources: coordinate-wise median and trimmed mean, Yin et al., 2018. Centred clipping, Karimireddy, He and Jaggi, 2021,
with the median as its centre and the median distance from it as its radius.
"""

from collections.abc import Sequence
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from fedunlearn.federation.messages import STATISTICS, Tensors
from fedunlearn.federation.replies import Results

Rule = Literal["none", "clip", "median", "trimmed_mean"]
FEWEST = 3  # updates, or nobody can say which is the odd one
TRIMMED = 0.25  # of the updates, at either end


def mean(replies: Sequence[Results], rule: Rule) -> Tensors:
    """Give the mean of the replies' updates under a rule.

    Args:
        replies: each of one client.
        rule: `median` and `trimmed_mean` take values one by one, and every client counts alike. `clip` moves updates
            that are further from the median than the median distance to that distance, and weighs them as usual.

    Example:
        >>> replies = [Results({"w": torch.tensor([value])}, 1.0) for value in (1.0, 2.0, 3.0, 100.0)]
        >>> mean(replies, "median")["w"], mean(replies, "clip")["w"]
        (tensor([2.5000]), tensor([2.5000]))
    """
    means = [one.mean() for one in replies]
    stacked = {name: torch.stack([update[name] for update in means]) for name in means[0]}
    middle = {name: _trimmed(values, (len(means) - 1) // 2) for name, values in stacked.items()}
    if rule == "median":
        return middle
    if rule == "trimmed_mean":
        return {name: _trimmed(values, int(TRIMMED * len(means))) for name, values in stacked.items()}
    away = {name: values - middle[name] for name, values in stacked.items()}
    weights = torch.tensor([one.weight for one in replies], dtype=torch.float64)
    weights = weights / weights.sum() * _clipping([_norm(away, place) for place in range(len(means))])
    return {name: (middle[name] + torch.tensordot(weights, v.double(), 1)).to(v.dtype) for name, v in away.items()}


def _trimmed(values: Tensor, each: int) -> Tensor:
    """The mean without so many of the lowest and of the highest values, [N, ...] -> [...]."""
    return values.sort(0).values[each : len(values) - each].mean(0)


def _norm(away: Tensors, place: int) -> float:
    """How far one update is from the centre; running statistics do not count."""
    weights = [values[place].double().square().sum() for name, values in away.items() if not name.endswith(STATISTICS)]
    return float(torch.stack(weights).sum().sqrt())


def _clipping(distances: list[float]) -> Tensor:
    radius = median(distances)
    return torch.tensor([min(1.0, radius / d) if d else 1.0 for d in distances], dtype=torch.float64)
