import numpy as np
import pytest

import reference
from fedunlearn.audit.membership_inference import logistic_mia


def probabilities(count, shift, seed):
    logits = np.random.default_rng(seed).normal(size=(count, 3)) + np.array([shift, 0, 0])
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_equal_distributions_cannot_be_told_apart_and_separate_ones_can():
    assert logistic_mia(probabilities(2000, 0, 0), probabilities(1000, 0, 1)) == pytest.approx(50, abs=4)
    assert logistic_mia(probabilities(400, -50, 0), probabilities(100, 50, 1)) == 100
    assert 60 < logistic_mia(probabilities(400, 0, 0), probabilities(100, 1, 1)) < 90


def test_value_by_hand():
    # one forget example in five looks like a retain example, and so do all retain examples: 1 error in 10
    retain, forget = np.array([[1.0, 0.0]] * 5), np.array([[0.0, 1.0]] * 4 + [[1.0, 0.0]])
    assert logistic_mia(retain, forget) == 90


def test_depends_on_the_seed_alone():
    retain, forget = probabilities(60, 0, 0), probabilities(40, 0.5, 1)
    assert logistic_mia(retain, forget) == logistic_mia(retain, forget)
    assert len({logistic_mia(retain, forget, seed=seed) for seed in range(5)}) > 1


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="60 retain and 4 forget examples for 5 folds"):
        logistic_mia(probabilities(60, 0, 0), probabilities(4, 0, 0))


@pytest.mark.parametrize("shift", [0, 0.5, 2])
def test_equals_scikit_learn_called_fold_by_fold(shift):
    retain, forget = probabilities(300, 0, 0), probabilities(70, shift, 1)
    assert logistic_mia(retain, forget, seed=3) == pytest.approx(reference.logistic_mia(retain, forget, seed=3))
