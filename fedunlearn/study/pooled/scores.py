"""The columns of the paper's tables for one model, and how far they are from gold's."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from fedunlearn.audit.membership_inference import logistic_mia
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.study.pooled.pool import Pool
from fedunlearn.study.pooled.settings import Search

Scores = dict[str, float]
"""Accuracies 0..1 by column: `client_0` for each forgotten client, `others`, `test`; `id_client_0` and `id_others` for
client IDs (models with a client head); `mia` in percent."""


class Answers(NamedTuple):
    """What one model says of all training examples and of the test set."""

    train: Predictions
    test: Counts

    @classmethod
    def of(cls, model: TwoHeadResNet18, pool: Pool, precision: str) -> "Answers":
        """One pass over everything."""
        return cls(pool.predict(model, pool.train.all(), precision), pool.count_test(model, precision))


def score(answers: Answers, forgotten: Sequence[int], *, seed: int) -> Scores:
    """Every column of the stage at which `forgotten` (in order) have left; the attack is on the last of them."""
    leaves = answers.train.client_ids == forgotten[-1]
    stays = ~torch.isin(answers.train.client_ids, torch.tensor(forgotten))
    features = answers.train.features().nan_to_num().numpy()  # a model may be dampened until nothing is left of it
    mia = logistic_mia(features[stays], features[leaves], seed=seed)
    return accuracies(answers.train, forgotten) | {"test": answers.test.class_accuracy, "mia": mia}


def accuracies(predictions: Predictions, forgotten: Sequence[int]) -> Scores:
    """The columns that need training examples alone."""
    counts = predictions.counts()
    others = sum((c for client, c in counts.items() if client not in forgotten), Counts())
    groups = {f"client_{client}": counts[client] for client in forgotten} | {"others": others}
    scores = {name: group.class_accuracy for name, group in groups.items()}
    if predictions.client_probs is not None:
        scores |= {f"id_{name}": group.client_accuracy for name, group in groups.items()}
    return scores


def column_weights(settings: Search, forgotten: Sequence[int]) -> dict[str, float]:
    """How much each column's deviation from gold counts in the search."""
    of_forgotten = {f"client_{client}": 1.0 for client in forgotten}
    if settings.objective == "forgotten":
        return of_forgotten
    return of_forgotten | {
        "others": settings.others_weight,
        "test": settings.test_weight,
        "id_others": settings.id_weight,
        "mia": settings.mia_weight,
    }


def deviation(scores: Scores, gold: Scores, weights: Mapping[str, float]) -> float:
    """Sum over columns of weight * |ours - gold's|; the attack's column counts as a share, not in percent."""
    return sum(
        weight * abs(scores[name] - gold[name]) / (100 if name == "mia" else 1)
        for name, weight in weights.items()
        if name in scores
    )
