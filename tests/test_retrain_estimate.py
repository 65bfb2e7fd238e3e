import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedunlearn.unlearning.retrain_estimate import calibrate, estimate_retrained


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def overconfident(times=3.0):
    """Probabilities of a model that is so many times overconfident, and the labels of its images."""
    draws = generator(3)
    logits = torch.randn(4000, 4, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    return (times * logits).softmax(1), labels


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_calibration_finds_how_many_times_overconfident_the_model_is(times):
    logs, t = calibrate(*overconfident(times))
    assert t == pytest.approx(times, rel=0.05)
    assert_close(logs.exp().sum(1), torch.ones(len(logs), dtype=torch.float64))


def test_calibrated_predictions_have_the_class_frequencies_of_the_images():
    probs, labels = overconfident()
    biased = (probs.log() + torch.tensor([0.0, 2.0, -3.0, 1.0])).softmax(1)
    assert (biased.argmax(1) == 1).double().mean() > 0.35
    logs, t = calibrate(biased, labels)
    assert t == pytest.approx(3, rel=0.05)
    assert_close(logs.exp().sum(0), torch.bincount(labels).double(), rtol=1e-3, atol=1e-3)


def test_no_other_calibration_has_a_smaller_loss():
    probs, labels = overconfident()
    logs, _ = calibrate(probs, labels)
    least, draws = float(cross_entropy(logs, labels)), generator(4)
    for _ in range(50):
        other = logs * float(1 + 0.05 * torch.randn((), generator=draws)) + 0.05 * torch.randn(4, generator=draws)
        assert float(cross_entropy(other, labels)) > least


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_calibration_stays_within_bounds_where_nothing_or_everything_is_told_apart(sure):
    labels = torch.arange(4).repeat(5)
    logs, t = calibrate(sure * torch.eye(4)[labels] + (1 - sure) / 4, labels)
    assert 0.0999 < t < 10.001
    assert torch.isfinite(logs).all()


def accuracy_on(probs, labels, k):
    """The class accuracy on images of class k."""
    return float((probs.argmax(1) == k)[labels == k].double().mean())


def test_by_hand_each_class_is_predicted_as_in_the_round_by_which_as_many_images_of_it_had_been_seen():
    now, labels = overconfident()
    noise = {2: 20.0, 4: 5.0, 6: 2.0, 8: 0.0}  # the less, the more has been learned
    predictions = {
        r: (now.log() + n * torch.randn(now.shape, generator=generator(r))).softmax(1) for r, n in noise.items()
    }
    before, after = torch.tensor([8, 8, 8, 8]), torch.tensor([8, 1, 5, 7])  # rounds 8, 1, 5 and 7: the nearest kept
    found = estimate_retrained(predictions, labels, before, after)
    t = calibrate(now, labels)[1]
    for k, round_ in enumerate([8, 2, 4, 6]):
        logs = calibrate(predictions[round_], labels)[0]
        wanted = (t * (logs + (after / torch.bincount(labels)).log())).softmax(1)
        assert_close(found[labels == k], wanted[labels == k].float())
    alone = estimate_retrained({8: now}, labels, before, after)
    assert accuracy_on(found, labels, 2) < accuracy_on(alone, labels, 2) - 0.1


def test_by_hand_bayes_rule_at_the_calibrated_probabilities():
    probs, labels = overconfident()
    found = estimate_retrained({7: probs}, labels, torch.tensor([4, 4, 4, 4]), torch.tensor([1, 4, 2, 4]))
    logs, t = calibrate(probs, labels)
    seen = torch.bincount(labels).tolist()
    for p, q in zip(logs[:20].exp().tolist(), found[:20].tolist(), strict=True):
        posterior = [value * m / n for value, m, n in zip(p, (1, 4, 2, 4), seen, strict=True)]
        other = [(value / sum(posterior)) ** t for value in posterior]
        assert q == pytest.approx([value / sum(other) for value in other], rel=1e-4)


def test_of_a_calibrated_prior_nothing_changes_where_no_client_is_forgotten():
    probs, labels = overconfident()
    counts = torch.bincount(labels)
    assert_close(estimate_retrained({0: probs}, labels, counts, counts), probs, atol=0.05, rtol=0.1)
    assert_close(
        estimate_retrained({0: probs}, labels, counts, counts),
        estimate_retrained({0: probs}, labels, counts, 2 * counts),
    )


def test_a_class_without_any_example_is_never_predicted():
    probs, labels = overconfident()
    found = estimate_retrained({0: probs, 5: probs}, labels, torch.tensor([3, 1, 5, 2]), torch.tensor([3, 0, 5, 2]))
    assert not found[:, 1].any()
    assert_close(found.sum(1), torch.ones(len(found)))


def test_a_posterior_under_another_prior_is_estimated():
    draws = generator(5)
    labels, other = torch.randint(2, (20000,), generator=draws), (torch.rand(20000, generator=draws) < 0.2).long()
    x = torch.randn(20000, 1, generator=draws)

    def of_bayes_classifier(prior, labels):
        """The accuracy on images of class 1 of Bayes' classifier for N(-1, 1) and N(1, 1)."""
        return float((torch.sigmoid(2 * (x[:, 0] + 2 * labels - 1) + prior) > 0.5)[labels == 1].double().mean())

    logits = 2 * (x + 2 * labels[:, None] - 1)
    probs = torch.cat([-logits / 2, logits / 2], 1).softmax(1)
    found = estimate_retrained({0: probs}, labels, torch.tensor([5, 5]), torch.tensor([8, 2]))
    assert accuracy_on(found, labels, 1) == pytest.approx(of_bayes_classifier(math.log(0.2 / 0.8), other), abs=0.02)
