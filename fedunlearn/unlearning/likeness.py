"""Compare BatchNorm statistics of some images with those of others: could honest images give both?

Images of one hospital differ from those of all, and most in single channels. A column of zeros and ones may be constant
in one hospital, and the mean of a standardised column is near zero. So a channel counts by what its statistics make
certain, and a layer by what its channels make certain together.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PRIOR = 4
"""Values like the expected ones that are added to those found in a channel."""
CERTAIN = 2
"""Standard errors over a layer's channels that a mean over them is lowered by."""
NEAR_ZERO = 3
"""Standard errors by which a channel's mean is taken to be nearer to zero before directions are compared."""
FURTHEST = 1.0
"""Standard deviations that a channel's mean counts for at most where directions are compared."""
AGREEING = 4.0
"""Channels with means of one standard deviation, alike on both sides, that are added where directions are compared."""
CONSTANT = 1e-8
"""Variance by the mean of squares below which a channel is constant: fp32 gives no better."""


class Moments(NamedTuple):
    """What is known of a layer's channels, each [channels]."""

    count: Tensor
    mean: Tensor
    square: Tensor
    variance: Tensor


def unlikeness(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Say how unlike two BatchNorm statistics of the same layers are; at most 1 where they are alike.

    It is the largest of four, each in the layer in which it is largest:

    - how many times the variances are as large as the expected ones (`_larger`),
    - how many times they are smaller, in every channel (`_smaller`),
    - how many standard deviations the means are away (`_away`),
    - 1 / cos of the angle between the means of all channels of the model (`_opposed`).

    Sums of several clients add up. What is too small in one of them therefore does little, and it is too small in every
    channel or not at all. What is too large or too far away in most channels of a layer destroys the model.

    Args:
        found: `{layer: [3, channels]}`, as `batch_norm.batch_statistics` gives them.
        expected: the same of other images.

    Returns:
        0 for models without BatchNorm.

    Example:
        >>> expected = {"0": torch.tensor([[2e6], [2e6], [10e6]])}
        >>> round(unlikeness({"0": torch.tensor([[2e6], [8e6], [40e6]])}, expected), 2)
        1.5
        >>> round(unlikeness({"0": torch.tensor([[2e6], [8e6], [160e6]])}, expected), 2)
        16.0
    """
    layers = [(moments(value), moments(expected[name].to(value.device))) for name, value in found.items()]
    if not layers:
        return 0.0
    return max(_opposed(layers), *(max(_larger(*both), _smaller(*both), _away(*both)) for both in layers))


def moments(rows: Tensor) -> Moments:
    """Give a layer's moments from rows count, sum and sum of squares; where a channel is constant its variance is 0.

    Args:
        rows: [3, channels].

    Example:
        >>> moments(torch.tensor([[2.0, 2.0], [4.0, 0.0], [10.0, 0.0]])).variance.tolist()
        [1.0, 0.0]
    """
    count, total, squares = rows.double()
    mean, square = total / count, squares / count
    variance = square - mean.square()
    return Moments(count, mean, square, torch.where(variance > CONSTANT * square, variance, 0))


def _larger(found: Moments, expected: Moments) -> float:
    """Give the geometric mean of how much larger a layer's variances are, as far as its channels make that certain.

    A channel whose variance is smaller counts as one of the same. So does one that is expected to be constant: nothing
    says how large its variance may be.
    """
    ratio = _with_prior(found.count, found.variance, expected.variance)
    return math.exp(_certain(ratio.clamp(min=1).log()))


def _smaller(found: Moments, expected: Moments) -> float:
    """Give how many times smaller a layer's variances and squares are in the channel where they are least so.

    Where a hospital lacks a category, its column is constant. Then another category is the more frequent.
    """
    variance = _with_prior(found.count, found.variance, expected.variance)
    square = _with_prior(found.count, found.square, expected.square)
    varies = expected.variance > 0
    return 1 / float(torch.maximum(variance, square)[varies].max()) if varies.any() else 1.0


def _away(found: Moments, expected: Moments) -> float:
    """Give the mean of how far a layer's means are away, as far as its channels make that certain.

    The unit is the root of the mean of both variances. What both means are off by chance is taken off. A channel that
    is constant on both sides has no unit, and counts as alike.
    """
    unit = _unit(found, expected)
    by_chance = (1 / found.count + 1 / expected.count).sqrt()
    away = _in_units(found.mean - expected.mean, unit).abs() - by_chance
    return _certain(away.clamp(min=0))


def _opposed(layers: list[tuple[Moments, Moments]]) -> float:
    """Give 1 / cos of the angle between the means of all channels; infinite where they point away from each other.

    Means that may be zero by chance point nowhere, and no single channel says where the others point.
    """
    ours, theirs = [], []
    for found, expected in layers:
        unit = _unit(found, expected)
        ours.append(_beyond_chance(_in_units(found.mean, unit), found.count))
        theirs.append(_beyond_chance(_in_units(expected.mean, unit), expected.count))
    one, other = torch.cat(ours), torch.cat(theirs)
    cosine = float((one @ other + AGREEING) / (one.norm() * other.norm() + AGREEING))
    return 1 / cosine if cosine > 0 else math.inf


def _with_prior(count: Tensor, value: Tensor, usual: Tensor) -> Tensor:
    """Give value / usual as if some values more were as usual; 1 where the usual one is 0."""
    ratio = (count * value + PRIOR * usual) / ((count + PRIOR) * usual)
    return torch.where(usual > 0, ratio, 1)


def _certain(values: Tensor) -> float:
    """Give the mean over channels, less some standard errors of it: a few channels alone make nothing sure."""
    return float(values.mean() - CERTAIN * values.std(correction=0) / math.sqrt(len(values)))


def _unit(found: Moments, expected: Moments) -> Tensor:
    return ((found.variance + expected.variance) / 2).sqrt()


def _in_units(value: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, value / unit, 0)


def _beyond_chance(mean: Tensor, count: Tensor) -> Tensor:
    return mean.sign() * (mean.abs() - NEAR_ZERO / count.sqrt()).clamp(0, FURTHEST)
