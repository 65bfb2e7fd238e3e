"""What the model gets right: on the retain clients' images, on those of forgotten clients, and on held-out images."""

from collections.abc import Collection
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from fedunlearn.errors import DestroyedError
from fedunlearn.federation import tasks
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.replies import MOST_LISTED, Results
from fedunlearn.nn.evaluate import Counts, Predictions

Scores = dict[str, Any]
NOBODY = ForgetSet(())

log = getLogger("fedunlearn")


class Scorer:
    """Scores the model of a federation; of forgotten clients only an auditor can say anything.

    Args:
        auditor: None where there is none, as between real machines: then `forgotten` stays empty.
    """

    def __init__(self, federation: Federation, auditor: Auditor | None) -> None:
        self._federation, self._auditor = federation, auditor

    def now(self, forget: ForgetSet = NOBODY) -> Scores:
        """Score the present model; `forget` says who is to be forgotten just now.

        Raises:
            DestroyedError: most retain clients cannot evaluate it.
        """
        retain, predictions = self._retain(), self._federation.predictions()
        return self.of(retain, predictions, forget)

    def of_any_model(self) -> Scores:
        """Score the present model, also one of which clients cannot say anything."""
        try:
            return self.now()
        except DestroyedError as error:
            log.warning("round %d: nobody can evaluate: %s", self._federation.round, error)
            return self.of(Results(), self._federation.predictions())

    def _retain(self) -> Results:
        federation = self._federation
        return federation.nodes.query(
            federation.grid, tasks.evaluate, federation.round, federation.retain, federation.state.params
        )

    def of(self, retain: Results, predictions: Predictions, forget: ForgetSet = NOBODY) -> Scores:
        """Give accuracies from what retain clients counted and from predictions on held-out images.

        Returns:
            `retain_clients` and `forgotten` by client, `retain` and `test` (without classes that leave whole): class
            and client-ID accuracy, 0..1, and examples; `held_out` of a forgotten client is what held-out images of its
            class counts get.
        """
        each = retain.counts if len(retain.counts) <= MOST_LISTED else {}
        known = sorted({*forget, *self._federation.forgotten})
        portions = self._federation.nodes.portions
        forgotten = [client for client in known if self._auditor and self._auditor.has_images(client, portions)]
        return {
            "retain_clients": {str(client): accuracies(counts) for client, counts in each.items()},
            "forgotten": {str(client): self._forgotten(client, predictions) for client in forgotten},
            "retain": accuracies(retain.total),
            "test": accuracies(predictions.without(forget.classes).total),
        }

    def _forgotten(self, client: int, predictions: Predictions) -> dict[str, float]:
        assert self._auditor is not None
        federation = self._federation
        (counts,) = torch.from_numpy(self._auditor.class_counts([client], federation.nodes.portions))
        found = self._auditor.evaluate(federation.state.params, client, federation.nodes.portions)
        return accuracies(found) | {"held_out": expected_accuracy(predictions, counts, federation.server.left)}


def expected_accuracy(predictions: Predictions, class_counts: Tensor, left: Collection[int]) -> float:
    """Give the accuracy to expect of held-out images of these class counts; of classes that left nothing is right."""
    there = class_counts.clone()
    there[sorted(left)] = 0
    fraction = float(there.sum() / class_counts.sum())
    return fraction * predictions.expected_accuracy(there) if fraction else 0.0


def accuracies(counts: Counts) -> dict[str, float]:
    """Give class and client-ID accuracy, and of how many examples."""
    return {"class": counts.class_accuracy, "client_id": counts.client_accuracy, "examples": counts.examples}
