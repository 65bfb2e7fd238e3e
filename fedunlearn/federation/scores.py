"""What the current model gets right: of those who stay, of those who left, and on the test images."""

from collections.abc import Sequence
from typing import Any

from fedunlearn.federation.client import Worker
from fedunlearn.federation.nodes import MOST_LISTED, Answer
from fedunlearn.nn.evaluate import Counts, Predictions

Scores = dict[str, Any]


def scores(worker: Worker, others: Answer, said: Predictions, forgotten: Sequence[int]) -> Scores:
    """Accuracies of everybody; `unseen` of a forgotten client is what unseen images of its class mix get.

    Args:
        worker: holds the model and the forgotten clients' images.
        others: what the clients who stay have counted.
        said: of the test images.
    """
    each = others.counts if len(others.counts) <= MOST_LISTED else {}
    left = {}
    for client in forgotten:
        unseen = said.expected_accuracy(worker.class_mix([client]))
        left[str(client)] = accuracies(worker.evaluate(client)) | {"unseen": unseen}
    return {
        "staying": {str(client): accuracies(counts) for client, counts in each.items()},
        "forgotten": left,
        "others": accuracies(others.total),
        "test": accuracies(said.total),
    }


def accuracies(counts: Counts) -> dict[str, float]:
    """Class and client-ID accuracy, and of how many examples."""
    return {"class": counts.class_accuracy, "client_id": counts.client_accuracy, "examples": counts.examples}
