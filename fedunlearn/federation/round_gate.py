"""A round that would destroy the model is not committed: the replies that do it are found, and left out."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.replies import Results

IMAGES = 64  # of the server's, on which a round's update is looked at
DIVERGED = 5  # times the limit: with such a loss training does not go on, whoever is to blame
Combine = Callable[[Sequence[Results]], Tensors]


class Found(NamedTuple):
    """Which replies a round can be made of, and which would destroy the model."""

    kept: list[Results]
    dropped: list[Results]


def limit(before: float, classes: int, band: float) -> float:
    """Give the held-out loss that a round may leave: so many times the one before, or that of guessing if that is more.

    Args:
        before: held-out loss of the model before the round.
        classes: K.
        band: how many times.
    """
    return band * max(before, math.log(classes))


def without_destroyers(
    replies: Sequence[Results], combine: Combine, loss: Callable[[Tensors], float], most: float
) -> Found | None:
    """Leave out the replies whose update alone does most harm, until the loss is as low as it may be; no more of them.

    Args:
        replies: of a round, one by one.
        combine: makes the update of some replies.
        loss: held-out loss of the model after an update; infinite where it is not finite.
        most: that the loss may be.

    Returns:
        None where nobody in particular is to blame: half of the replies would have to go.
    """
    alone = [loss(combine([one])) for one in replies]
    by_harm = sorted(range(len(replies)), key=lambda place: alone[place], reverse=True)
    dropped: list[int] = []

    def is_sound() -> bool:
        kept = [one for place, one in enumerate(replies) if place not in dropped]
        return loss(combine(kept)) <= most

    while not is_sound():
        if 2 * (len(dropped) + 1) >= len(replies):
            return None
        dropped.append(by_harm[len(dropped)])
    for place in dropped[::-1]:
        dropped.remove(place)
        if not is_sound():
            dropped.append(place)
    kept = [one for place, one in enumerate(replies) if place not in dropped]
    return Found(kept, [replies[place] for place in dropped])
