"""The columns of the paper's tables for one model, and how far they are from the retrained model's."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fedunlearn.audit.membership_inference import logistic_mia
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.study.pooled.pool import Pool
from fedunlearn.study.pooled.settings import Search

Scores = dict[str, float]
"""Accuracies 0..1 by column: `client_0` for each forgotten client, `retain` for the retain clients, `test`;
`id_client_0` and `id_retain` for client IDs (models with a client head); `mia` in percent."""


class AllPredictions(NamedTuple):
    """What one model predicts on all training examples, and counts of its hits on the test set."""

    train: Predictions
    test: Counts

    @classmethod
    def of(cls, model: TwoHeadModel, pool: Pool, precision: str) -> "AllPredictions":
        """Make one pass over everything."""
        return cls(pool.predict(model, pool.train.all(), precision), pool.count_test(model, precision))


def score(predictions: AllPredictions, forgotten: Sequence[int], *, seed: int) -> Scores:
    """Give every column of the stage at which the clients `forgotten` (in order) are forgotten.

    The membership inference attack is on the last of them, against all retain clients.
    """
    forget = predictions.train.client_ids == forgotten[-1]
    retain = ~torch.isin(predictions.train.client_ids, torch.tensor(forgotten))
    features = predictions.train.features().nan_to_num().numpy()  # a model may be dampened until nothing is left of it
    mia = logistic_mia(features[retain], features[forget], seed=seed)
    return accuracies(predictions.train, forgotten) | {"test": predictions.test.class_accuracy, "mia": mia}


def accuracies(predictions: Predictions, forgotten: Sequence[int]) -> Scores:
    """Give the columns that need training examples alone."""
    counts = predictions.counts()
    retain = sum((c for client, c in counts.items() if client not in forgotten), Counts())
    groups = {f"client_{client}": counts[client] for client in forgotten} | {"retain": retain}
    scores = {name: group.class_accuracy for name, group in groups.items()}
    if predictions.client_probs is not None:
        scores |= {f"id_{name}": group.client_accuracy for name, group in groups.items()}
    return scores


def column_weights(settings: Search, forgotten: Sequence[int]) -> dict[str, float]:
    """Give the weight of each column's deviation from the retrained model in the search."""
    of_forgotten = {f"client_{client}": 1.0 for client in forgotten}
    if settings.objective == "forgotten":
        return of_forgotten
    return of_forgotten | {
        "retain": settings.retain_weight,
        "test": settings.test_weight,
        "id_retain": settings.id_weight,
        "mia": settings.mia_weight,
    }


def deviation(scores: Scores, retrained: Scores, weights: Mapping[str, float]) -> float:
    """Sum over columns weight * |ours - the retrained model's|; MIA accuracy counts as a fraction, not in percent."""
    return sum(
        weight * abs(scores[name] - retrained[name]) / (100 if name == "mia" else 1)
        for name, weight in weights.items()
        if name in scores
    )
