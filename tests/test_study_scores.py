import numpy as np
import pytest
import torch

import reference
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.study.pooled.scores import AllPredictions, accuracies, column_weights, deviation, score
from fedunlearn.study.pooled.settings import Search


def predictions(per_client=6, clients=3, client_head=True):
    """Client c is right on its first c + 2 examples, about class and client both."""
    ids = torch.arange(clients).repeat_interleave(per_client)
    right = torch.arange(per_client).repeat(clients) < ids + 2
    noise = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)) / 10
    class_probs = torch.where(right, 0.8 + noise, 0.2 - noise)[:, None] * torch.tensor([1.0, 0.0])
    class_probs[:, 1] = 1 - class_probs[:, 0]
    client_probs = torch.full((len(ids), clients), 0.1)
    client_probs[torch.arange(len(ids)), torch.where(right, ids, (ids + 1) % clients)] = 0.8
    train = Predictions(class_probs, client_probs if client_head else None, torch.zeros_like(ids), ids)
    return AllPredictions(train, Counts(10, 1.0, 7, 0))


def test_columns_by_hand():
    scores = accuracies(predictions().train, [1, 0])
    fractions = {"client_1": 3 / 6, "client_0": 2 / 6, "retain": 4 / 6}
    assert scores == pytest.approx(fractions | {f"id_{name}": fraction for name, fraction in fractions.items()})
    assert "id_retain" not in accuracies(predictions(client_head=False).train, [1])


@pytest.mark.parametrize("client_head", [True, False])
def test_the_attack_is_on_the_last_forgotten_client_against_the_retain_clients(client_head):
    given = predictions(client_head=client_head)
    features, ids = given.train.features().numpy(), given.train.client_ids.numpy()
    assert features.shape[1] == (5 if client_head else 2)
    expected = reference.logistic_mia(features[~np.isin(ids, [0, 1])], features[ids == 1], seed=4)
    scores = score(given, [0, 1], seed=4)
    assert scores["mia"] == pytest.approx(expected)
    assert scores["test"] == 0.7


def test_a_model_of_which_nothing_is_left_can_be_attacked_too():
    given = predictions()
    given.train.class_probs.fill_(torch.nan)
    assert 0 <= score(given, [0], seed=0)["mia"] <= 100


def test_deviation_by_hand():
    ours, retrained = {"client_0": 0.9, "test": 0.5, "mia": 70.0}, {"client_0": 0.7, "test": 0.6, "mia": 75.0}
    assert deviation(ours, retrained, {"client_0": 1.0, "id_retain": 1.0}) == pytest.approx(0.2)
    assert deviation(ours, retrained, {"client_0": 1.0, "test": 2.0, "mia": 1.0}) == pytest.approx(0.2 + 0.2 + 0.05)


def test_the_objective_looks_at_forgotten_clients_or_at_every_column():
    assert column_weights(Search(), [0, 2]) == {"client_0": 1, "client_2": 1}
    weighted = column_weights(Search(objective="weighted", test_weight=3.0), [0])
    assert weighted == {"client_0": 1, "retain": 1, "test": 3, "id_retain": 1, "mia": 1}
