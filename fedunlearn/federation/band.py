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
VERBS = {"update": "is", "statistics": "are"}

Replies = Iterable[tuple[Message, Results]]


def judged(replies: Replies, width: float, examples: Mapping[int, int]) -> Iterator[tuple[Message, Results, str]]:
    """Give replies in their order, each with the reason why it is refused, or an empty one.

    The first five wait for each other, and each is compared with the median of the others. Later ones are compared with
    the median of all that were taken. Of fewer than three replies nobody can say which is the odd one.

    Args:
        replies: to one query, each with the message that it answers.
        width: times the median that a size may be; 0 lets everything pass.
        examples: that each client has.
    """
    if not width:
        yield from ((message, one, "") for message, one in replies)
        return
    coming = iter(replies)
    first = list(islice(coming, FIRST))
    sizes = [sizes_of(one, examples) for _, one in first]
    taken = []
    for place, (message, one) in enumerate(first):
        reason = too_large(sizes[place], sizes[:place] + sizes[place + 1 :], width)
        if not reason:
            taken.append(sizes[place])
        yield message, one, reason
    for message, one in coming:
        size = sizes_of(one, examples)
        reason = too_large(size, taken, width)
        if not reason:
            taken.append(size)
        yield message, one, reason


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


def too_large(size: Mapping[str, float], others: list[dict[str, float]], width: float) -> str:
    """Say why a reply is refused beside the sizes of others; nothing where it is not."""
    for kind, value in size.items():
        known = [other[kind] for other in others if kind in other]
        usual = median(known) if len(known) >= FEWEST - 1 else math.inf
        if usual and value > width * usual:
            return f"its {kind} {VERBS[kind]} {value / usual:.3g} times as large as is usual (reply_band)"
    return ""
