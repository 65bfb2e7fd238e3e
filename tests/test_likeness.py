"""What BatchNorm statistics of honest clients may look like, and what those of liars look like."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedunlearn.unlearning import batch_norm
from fedunlearn.unlearning.likeness import moments, unlikeness

BAND = 3


def images(n=24, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def statistics(data, layer=None):
    data = torch.as_tensor(np.asarray(data), dtype=torch.float32)
    data = data[:, :, None, None] if data.ndim == 2 else data
    return batch_norm.batch_statistics(layer or nn.Sequential(nn.BatchNorm2d(data.shape[1])), [data])


def scaled(statistics, by):
    return {n: torch.stack([count, by * total, by**2 * squares]) for n, (count, total, squares) in statistics.items()}


@pytest.mark.parametrize("by", [0.3, 3.0, 10.0])
def test_statistics_of_scaled_images_are_unlike_by_the_square_and_those_of_other_images_are_not(by):
    one, other = (statistics(1 + images(200, seed)) for seed in (0, 1))
    assert unlikeness(one, one) == pytest.approx(1)
    assert unlikeness(other, one) < 1.2
    assert unlikeness(scaled(one, by), one) == pytest.approx(max(by, 1 / by) ** 2, rel=0.05)


@pytest.mark.parametrize("values", [2, 3, 5, 20])
def test_few_values_are_not_unlike_by_chance(values):
    layer = nn.Sequential(nn.BatchNorm2d(64))
    random = torch.Generator().manual_seed(0)
    expected = batch_norm.batch_statistics(layer, [1 + torch.randn(1000, 64, 1, 1, generator=random)])
    for _ in range(200):
        few = batch_norm.batch_statistics(layer, [1 + torch.randn(values, 64, 1, 1, generator=random)])
        assert unlikeness(few, expected) < BAND


def test_shifted_images_are_unlike_by_standard_deviations_and_nothing_is_unlike_everything():
    data = images(200)
    expected = statistics(10 + data)
    assert unlikeness(statistics(6 + data), expected) == pytest.approx(4, rel=0.05)
    assert unlikeness(scaled(expected, 0), expected) > 1000


@pytest.mark.parametrize("change", [torch.neg, lambda means: means.roll(1), lambda means: means.flip(0)])
def test_means_that_point_elsewhere_are_unlike_whatever_their_size(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128))
    one, other = (statistics(1 + images(200, seed), model) for seed in (0, 1))
    lied = {name: torch.stack([value[0], change(value[1]), value[2]]) for name, value in one.items()}
    assert unlikeness(other, one) < 1.2
    assert unlikeness(lied, one) > BAND


@pytest.mark.parametrize("channels", [32, 64])
def test_a_lie_in_half_of_the_channels_is_unlike_and_one_in_a_single_channel_is_as_in_a_dead_one(channels):
    expected = statistics(np.random.default_rng(0).standard_normal((64, channels)))
    (found,) = expected.values()
    for many, is_unlike in ((channels // 2, True), (1, False)):
        lied = found.clone()
        lied[2, :many] *= 1e30
        assert (unlikeness({"0": lied}, expected) > BAND) == is_unlike


def naive_unlikeness(found, expected):
    """The four comparisons of one layer, channel by channel."""
    rows = [
        (n, t / n, s / n, s / n - (t / n) ** 2, m, u / m, q / m, q / m - (u / m) ** 2)
        for (n, t, s), (m, u, q) in zip(found.T.tolist(), expected.T.tolist(), strict=True)
    ]

    def sure(values):
        mean = sum(values) / len(values)
        return mean - 2 * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) / math.sqrt(len(values))

    def toward(mean, unit, count):
        return math.copysign(min(1, max(0, abs(mean / unit) - 3 / math.sqrt(count))), mean)

    ratios = [(n * var + 4 * usual) / ((n + 4) * usual) for n, _, _, var, _, _, _, usual in rows]
    squares = [(n * square + 4 * usual) / ((n + 4) * usual) for n, _, square, _, _, _, usual, _ in rows]
    units = [math.sqrt((var + usual) / 2) for _, _, _, var, _, _, _, usual in rows]
    away = [
        max(0, abs(mean - usual) / unit - math.sqrt(1 / n + 1 / m))
        for (n, mean, _, _, m, usual, _, _), unit in zip(rows, units, strict=True)
    ]
    one = [toward(row[1], unit, row[0]) for row, unit in zip(rows, units, strict=True)]
    other = [toward(row[5], unit, row[4]) for row, unit in zip(rows, units, strict=True)]
    lengths = math.sqrt(sum(v * v for v in one)) * math.sqrt(sum(v * v for v in other))
    cosine = (sum(v * w for v, w in zip(one, other, strict=True)) + 4) / (lengths + 4)
    larger = math.exp(sure([max(0, math.log(ratio)) for ratio in ratios]))
    smaller = 1 / max(map(max, zip(ratios, squares, strict=True)))
    return max(larger, smaller, sure(away), 1 / cosine)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.4, 0.2), (2.5, 0.5), (1, 2), (1, -0.6)])
def test_it_is_what_slow_loops_over_channels_give(scale, shift):
    random = np.random.default_rng(3)
    centre = random.standard_normal(12)
    found = statistics(shift + scale * (centre + random.standard_normal((30, 12))))["0"]
    expected = statistics(centre + random.standard_normal((64, 12)))["0"]
    assert unlikeness({"0": found}, {"0": expected}) == pytest.approx(naive_unlikeness(found, expected), rel=1e-4)


def test_moments_of_a_constant_channel_have_no_variance_whatever_rounding_says():
    rows = torch.tensor([[30.0, 30.0], [30 * 2019.1, 30.0], [30 * 2019.1**2 + 1e-2, 60.0]])
    assert moments(rows).variance.tolist() == [0.0, 1.0]


def one_hot(codes, many):
    return np.eye(many)[codes]


def hospitals(kind, random):
    """Rows of three hospitals, as standardised columns, columns of zeros and ones, or other honest columns."""
    owner = np.repeat([0, 1, 2], 100)
    numbers = random.standard_normal((300, 3))
    severity = (1.5 * (owner - 1) + random.standard_normal(300))[:, None]
    ward = 6 * owner + random.integers(0, 6, 300)
    rare = (owner == 2) & (random.random(300) < 0.1)
    table = {
        "standardised": numbers,
        "one severity": severity + 0.5 * random.standard_normal((300, 30)),
        "one severity, few columns": severity + 0.5 * random.standard_normal((300, 3)),
        "wards": one_hot(ward, 18),
        "wards and numbers": np.hstack([numbers, one_hot(ward, 18)]),
        "a scanner of its own": np.hstack([numbers, one_hot(owner, 3), one_hot(owner, 3)]),
        "rare": np.hstack([numbers, rare[:, None]]),
        "constant": np.hstack([numbers, np.zeros((300, 1)), np.full((300, 1), 5.0)]),
        "constant in each": np.hstack([numbers, 10.0 * owner[:, None]]),
        "skewed": np.exp(random.standard_normal((300, 4))),
        "years": np.hstack([numbers, 2015.0 + random.integers(0, 9, (300, 1)), 1.7e9 + 1e7 * random.random((300, 1))]),
        "children in one": np.hstack(
            [numbers, np.where(owner == 0, 8 + 4 * numbers[:, 0], 60 + 15 * numbers[:, 0])[:, None]]
        ),
    }[kind]
    scaled = (table - table.mean(0)) / np.where(table.std(0) > 0, table.std(0), 1)
    return [[rows[owner == k] for k in range(3)] for rows in (table, scaled)]


KINDS = (
    "standardised", "one severity", "one severity, few columns", "wards", "wards and numbers", "a scanner of its own",
    "rare", "constant", "constant in each", "skewed", "years", "children in one",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [10, 80])
def test_honest_hospitals_are_alike_whatever_columns_they_have(kind, rows):
    for seed in range(4):
        random = np.random.default_rng(seed)
        for parts in hospitals(kind, random):
            held_out = random.permutation(np.concatenate([part[80:] for part in parts]))
            expected = statistics(held_out)
            for part in parts:
                assert unlikeness(statistics(part[:rows]), expected) < BAND
