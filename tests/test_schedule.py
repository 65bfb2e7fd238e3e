import pytest

from fedunlearn.nn.schedule import learning_rate, loss_weights

WEIGHTS = {"class_weight": 1.0, "client_weight": 0.5, "disentangle_weight": 0.1}


def test_learning_rates():
    steps = [learning_rate(p, lr=1.0, schedule="steps") for p in (0, 0.49, 0.5, 0.74, 0.75, 1)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    cosine = [learning_rate(p, lr=2.0, schedule="cosine") for p in (0, 0.5, 1, 1.5)]
    assert cosine == pytest.approx([2, 1, 0, 0])
    assert learning_rate(0.9, lr=0.3, schedule="constant") == 0.3


def test_the_first_tenth_has_the_class_loss_alone():
    assert loss_weights(19 / 200, WEIGHTS, warmup=0.1) == {
        "class_weight": 1,
        "client_weight": 0,
        "disentangle_weight": 0,
    }
    assert loss_weights(20 / 200, WEIGHTS, warmup=0.1) == WEIGHTS
