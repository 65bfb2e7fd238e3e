"""Replies that are far larger than the others of the same query are refused."""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from statistics import mean, median

import torch
from flwr.app import Message

from fedunlearn.federation.messages import STATISTICS
from fedunlearn.federation.replies import Results

FIRST = 5
FEWEST = 3
OUTSIZED = 3  # times the usual size of an update; honest ones are at most twice as large
VERBS = {"update": "is", "statistics": "are"}

Replies = Iterable[tuple[Message, Results]]


def judged(replies: Replies, width: float, examples: Mapping[int, int]) -> Iterator[tuple[Message, Results, str]]:
    """Give replies in their order, each with the reason why it is refused, or an empty one.

    The first five wait for each other, and each is compared with the median of the others. Later ones are compared with
    the median of all that were taken. Of fewer than three replies nobody can say which is the odd one. An update
    of more than three times the median is taken, but its clients are listed in `Results.outsized`.

    Args:
        replies: to one query, each with the message that it answers.
        width: times the median that a size may be; 0 lets everything pass.
        examples: that each client has.
    """
    if not width:
        yield from ((message, one, "") for message, one in replies)
        return
    taken: list[dict[str, float]] = []

    def judge(one: Results, size: dict[str, float], others: list[dict[str, float]]) -> str:
        times = times_usual(size, others)
        reason = too_large(times, width)
        if not reason:
            taken.append(size)
            if times.get("update", 0.0) > OUTSIZED:
                one.outsized |= one.counts.keys()
        return reason

    coming = iter(replies)
    first = list(islice(coming, FIRST))
    sizes = [sizes_of(one, examples) for _, one in first]
    for place, (message, one) in enumerate(first):
        yield message, one, judge(one, sizes[place], sizes[:place] + sizes[place + 1 :])
    for message, one in coming:
        yield message, one, judge(one, sizes_of(one, examples), taken)


def sizes_of(one: Results, examples: Mapping[int, int]) -> dict[str, float]:
    """Measure a reply: the norm of its mean over the root of a client's examples, and statistics by example.

    Updates of more steps are larger, about by the root of the steps. Running statistics of BatchNorm do not count.
    """
    found = {}
    means = [value.double() / one.weight for name, value in one.tensors.items() if not name.endswith(STATISTICS)]
    if means:
        norm = torch.stack([value.square().sum() for value in means]).sum().sqrt()
        found["update"] = float(norm) / math.sqrt(max(1, mean(examples[client] for client in one.counts)))
    if one.statistics:
        found["statistics"] = max(float(v.double().norm()) / max(1, examples[c]) for c, v in one.statistics.items())
    return found


def times_usual(size: Mapping[str, float], others: list[dict[str, float]]) -> dict[str, float]:
    """Give each size of a reply as times the median of others', as far as there are enough of them."""
    found = {}
    for kind, value in size.items():
        known = [other[kind] for other in others if kind in other]
        if len(known) >= FEWEST - 1 and (usual := median(known)):
            found[kind] = value / usual
    return found


def too_large(times: Mapping[str, float], width: float) -> str:
    """Say why a reply is refused whose sizes are so many times the usual; nothing where it is not."""
    for kind, value in times.items():
        if value > width:
            return f"its {kind} {VERBS[kind]} {value:.3g} times as large as is usual (reply_band)"
    return ""
