"""A round that would destroy the model is not committed: the replies that do it are found, and left out."""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from logging import getLogger
from typing import NamedTuple

from fedunlearn.errors import DestroyedError, NotNowError
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.nodes import Nodes
from fedunlearn.federation.replies import MOST, Results

IMAGES = 64  # of the server's, on which a round's update is looked at
GOOD = 0.1  # of the loss of guessing: that of a model with nine in ten right, about
DIVERGED = 5  # times the limit: with such a loss training does not go on, whoever is to blame
Combine = Callable[[Sequence[Results]], Tensors]
OnReply = Callable[[Results], None]

log = getLogger("fedunlearn")


class Found(NamedTuple):
    """Which replies a round can be made of, and which would destroy the model."""

    kept: list[Results]
    dropped: list[Results]


class RoundGate:
    """Looks at what clients' training would make of the model before it moves.

    Args:
        nodes: that the clients are on.
        loss: held-out loss of the model after an update; infinite where it is not finite.
        classes: K.
        band: times the loss before, or that of guessing, that a loss may be; 0 lets everything pass.
    """

    def __init__(self, nodes: Nodes, loss: Callable[[Tensors], float], classes: int, band: float) -> None:
        self._nodes, self._loss, self._classes, self._band = nodes, loss, classes, band

    def most_loss(self, before: float) -> float:
        """Give the held-out loss with which a model can still be trained, after one of a loss before."""
        return DIVERGED * limit(before, self._classes, self._band) if self._band else MOST

    def passed(
        self, results: Results, round_: int, ask_again: Callable[[OnReply], Results]
    ) -> tuple[Results, list[Results]]:
        """Give a query's results; where they would destroy the model, without the replies that do, and these apart.

        The results have the costs of all that was asked, of what is left out too.

        Where an update is far larger than is usual (`outsized`), less is let pass: a good model is to stay good.

        Args:
            results: of clients that trained; the model moves by their mean.
            round_: for the log.
            ask_again: asks the same clients once more. They reply the same, and each reply is shown.

        Raises:
            DestroyedError: whoever is left out, the model would be of no use.
            NotNowError: nobody replies once more.
        """
        if not self._band:
            return results, []
        reached = self._loss(results.mean())
        of_guessing = limit(0.0, self._classes, self._band)
        if reached <= of_guessing and not results.outsized:  # whatever the loss was before
            return results, []
        before = self._loss({})
        most = limit(before, self._classes, self._band)
        usual = self._band * max(before, GOOD * math.log(self._classes))
        if reached <= (usual if results.outsized else most):
            return results, []
        found = None
        if before <= of_guessing:  # of another model honest replies may do harm too
            log.warning("round %d: its update would harm the model; asking again: whose reply does that?", round_)
            replies: list[Results] = []
            results.charge(ask_again(replies.append))
            if not replies:
                raise NotNowError("nobody answered when all were asked again, whose update would harm the model")
            found = without_destroyers(replies, self._nodes.mean, self._loss, usual, among=results.outsized)
            if found is None and reached > most:
                found = without_destroyers(replies, self._nodes.mean, self._loss, most)
        if found is None:
            if reached > DIVERGED * most:
                raise DestroyedError(f"the held-out loss would be more than {DIVERGED * most:.3g}, whoever is left out")
            if reached > most:
                log.warning("round %d: its held-out loss is high, and nobody in particular is to blame", round_)
            return results, []
        kept = self._without(found, round_, results)
        again = {client for one in replies for client in one.counts}
        silent = {client: counts for client, counts in results.counts.items() if client not in again}
        return kept, [*found.dropped, *([Results(counts=silent)] if silent else [])]

    def _without(self, found: Found, round_: int, asked: Results) -> Results:
        """Name whose replies are left out, and give the results of the others, at the cost of all that was asked."""
        for one in found.dropped:
            node, clients = self._nodes.node_of(one.counts), self._nodes.listed(one.counts)
            reason = "with its update the held-out loss is above the limit, without it below (round_band)"
            log.warning("round %d: node %d (clients %s) is left out: %s", round_, node, clients, reason)
        kept = Results()
        for one in found.kept:
            kept.include(one)
        tensors = {name: kept.weight * value for name, value in self._nodes.mean(found.kept).items()}
        return replace(
            asked,
            tensors=tensors,
            weight=kept.weight,
            counts=kept.counts,
            statistics=kept.statistics,
            outsized=kept.outsized,
        )


def limit(before: float, classes: int, band: float) -> float:
    """Give the held-out loss that a round may leave: so many times the one before, or that of guessing if that is more.

    Args:
        before: held-out loss of the model before the round.
        classes: K.
        band: how many times.
    """
    return band * max(before, math.log(classes))


def without_destroyers(
    replies: Sequence[Results],
    combine: Combine,
    loss: Callable[[Tensors], float],
    most: float,
    *,
    among: Container[int] | None = None,
) -> Found | None:
    """Leave out the replies whose update alone does most harm, until the loss is as low as it may be; no more of them.

    Args:
        replies: of a round, one by one.
        combine: makes the update of some replies.
        loss: held-out loss of the model after an update; infinite where it is not finite.
        most: that the loss may be.
        among: clients whose replies may be left out; by default all.

    Returns:
        None where nobody in particular is to blame: half of the replies would have to go, or others.
    """
    suspects = [place for place, one in enumerate(replies) if among is None or any(c in among for c in one.counts)]
    alone = {place: loss(combine([replies[place]])) for place in suspects}
    by_harm = sorted(suspects, key=alone.__getitem__, reverse=True)
    dropped: list[int] = []

    def is_sound() -> bool:
        kept = [one for place, one in enumerate(replies) if place not in dropped]
        return loss(combine(kept)) <= most

    while not is_sound():
        if len(dropped) == len(by_harm) or 2 * (len(dropped) + 1) >= len(replies):
            return None
        dropped.append(by_harm[len(dropped)])
    for place in dropped[::-1]:
        dropped.remove(place)
        if not is_sound():
            dropped.append(place)
    kept = [one for place, one in enumerate(replies) if place not in dropped]
    return Found(kept, [replies[place] for place in dropped])
