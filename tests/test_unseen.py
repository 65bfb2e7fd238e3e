import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedunlearn.unlearning.retrain_estimate import calibrated, foretold
from fedunlearn.unlearning.soft_labels import match_answers


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_by_hand_the_pairs_with_the_largest_sum_of_products_meet():
    views = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    answers = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    found = match_answers(views, torch.tensor([0, 0]), answers, torch.tensor([0, 0]), generator=generator())
    assert_close(found, answers[[1, 0]])


def test_it_is_the_best_of_all_pairings_within_each_class():
    torch.manual_seed(1)
    views, answers = torch.rand(8, 3).softmax(1), torch.rand(8, 3).softmax(1)
    labels = torch.tensor([0, 1] * 4)
    found = match_answers(views, labels, answers, labels, generator=generator())
    for k in (0, 1):
        v, a = views[labels == k], answers[labels == k]
        best = max(float((v * a[list(order)]).sum()) for order in itertools.permutations(range(4)))
        assert float((v * found[labels == k]).sum()) == pytest.approx(best)


def test_every_answer_is_taken_once_before_any_comes_again():
    answers, labels = torch.eye(5)[:3], torch.zeros(7, dtype=torch.int64)
    found = match_answers(torch.rand(7, 5), labels, answers, torch.zeros(3, dtype=torch.int64), generator=generator())
    assert sorted(found.sum(0).tolist()) == [0, 0, 2, 2, 3]


def test_accuracy_and_confidence_are_those_of_unseen_images():
    torch.manual_seed(2)
    labels = torch.arange(4).repeat(50)
    answers = torch.randn(200, 4).mul(2).softmax(1)
    found = match_answers(torch.rand(200, 4), labels, answers, labels, generator=generator())
    assert (found.argmax(1) == labels).sum() == (answers.argmax(1) == labels).sum()
    assert_close(found.amax(1).sort().values, answers.amax(1).sort().values)


def test_a_class_without_unseen_images_takes_answers_of_others():
    answers = torch.tensor([[0.5, 0.5]])
    found = match_answers(torch.rand(2, 2), torch.tensor([0, 1]), answers, torch.tensor([0]), generator=generator())
    assert_close(found, answers.expand(2, 2))


def too_sure(times=3.0):
    """Probabilities of a model that is so many times too sure, and the labels of its images."""
    draws = generator(3)
    logits = torch.randn(4000, 4, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    return (times * logits).softmax(1), labels


@pytest.mark.parametrize("times", [0.5, 1.0, 3.0])
def test_calibration_says_how_many_times_too_sure_the_model_is(times):
    logs, t = calibrated(*too_sure(times))
    assert t == pytest.approx(times, rel=0.05)
    assert_close(logs.exp().sum(1), torch.ones(len(logs), dtype=torch.float64))


def test_calibrated_answers_are_as_often_of_a_class_as_images_are():
    probs, labels = too_sure()
    biased = (probs.log() + torch.tensor([0.0, 2.0, -3.0, 1.0])).softmax(1)
    assert (biased.argmax(1) == 1).double().mean() > 0.35
    logs, t = calibrated(biased, labels)
    assert t == pytest.approx(3, rel=0.05)
    assert_close(logs.exp().sum(0), torch.bincount(labels).double(), rtol=1e-3, atol=1e-3)


def test_no_other_calibration_has_a_smaller_loss():
    probs, labels = too_sure()
    logs, _ = calibrated(probs, labels)
    least, draws = float(cross_entropy(logs, labels)), generator(4)
    for _ in range(50):
        other = logs * float(1 + 0.05 * torch.randn((), generator=draws)) + 0.05 * torch.randn(4, generator=draws)
        assert float(cross_entropy(other, labels)) > least


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_calibration_stays_within_bounds_where_nothing_or_everything_is_told_apart(sure):
    labels = torch.arange(4).repeat(5)
    logs, t = calibrated(sure * torch.eye(4)[labels] + (1 - sure) / 4, labels)
    assert 0.0999 < t < 10.001
    assert torch.isfinite(logs).all()


def right_share(probs, labels, k):
    """Of images of class k."""
    return float((probs.argmax(1) == k)[labels == k].double().mean())


def test_by_hand_each_class_is_as_far_as_in_the_round_by_which_as_much_had_been_seen():
    now, labels = too_sure()
    noise = {2: 20.0, 4: 5.0, 6: 2.0, 8: 0.0}  # the less, the more has been learned
    said = {r: (now.log() + n * torch.randn(now.shape, generator=generator(r))).softmax(1) for r, n in noise.items()}
    before, after = torch.tensor([8, 8, 8, 8]), torch.tensor([8, 1, 5, 7])  # rounds 8, 1, 5 and 7: the nearest kept
    found = foretold(said, labels, before, after)
    t = calibrated(now, labels)[1]
    for k, round_ in enumerate([8, 2, 4, 6]):
        logs = calibrated(said[round_], labels)[0]
        wanted = (t * (logs + (after / torch.bincount(labels)).log())).softmax(1)
        assert_close(found[labels == k], wanted[labels == k].float())
    alone = foretold({8: now}, labels, before, after)
    assert right_share(found, labels, 2) < right_share(alone, labels, 2) - 0.1


def test_by_hand_bayes_rule_at_the_calibrated_probabilities():
    probs, labels = too_sure()
    found = foretold({7: probs}, labels, torch.tensor([4, 4, 4, 4]), torch.tensor([1, 4, 2, 4]))
    logs, t = calibrated(probs, labels)
    seen = torch.bincount(labels).tolist()
    for p, q in zip(logs[:20].exp().tolist(), found[:20].tolist(), strict=True):
        posterior = [value * m / n for value, m, n in zip(p, (1, 4, 2, 4), seen, strict=True)]
        other = [(value / sum(posterior)) ** t for value in posterior]
        assert q == pytest.approx([value / sum(other) for value in other], rel=1e-4)


def test_of_a_calibrated_prior_nothing_changes_where_nobody_leaves():
    probs, labels = too_sure()
    mix = torch.bincount(labels)
    assert_close(foretold({0: probs}, labels, mix, mix), probs, atol=0.05, rtol=0.1)
    assert_close(foretold({0: probs}, labels, mix, mix), foretold({0: probs}, labels, mix, 2 * mix))


def test_a_class_of_which_nothing_is_left_is_never_the_answer():
    probs, labels = too_sure()
    found = foretold({0: probs, 5: probs}, labels, torch.tensor([3, 1, 5, 2]), torch.tensor([3, 0, 5, 2]))
    assert not found[:, 1].any()
    assert_close(found.sum(1), torch.ones(len(found)))


def test_a_posterior_under_another_prior_is_foretold():
    draws = generator(5)
    labels, other = torch.randint(2, (20000,), generator=draws), (torch.rand(20000, generator=draws) < 0.2).long()
    x = torch.randn(20000, 1, generator=draws)

    def of_bayes_classifier(prior, labels):
        """Of Bayes' classifier for N(-1, 1) and N(1, 1), among images of class 1."""
        return float((torch.sigmoid(2 * (x[:, 0] + 2 * labels - 1) + prior) > 0.5)[labels == 1].double().mean())

    logits = 2 * (x + 2 * labels[:, None] - 1)
    probs = torch.cat([-logits / 2, logits / 2], 1).softmax(1)
    found = foretold({0: probs}, labels, torch.tensor([5, 5]), torch.tensor([8, 2]))
    assert right_share(found, labels, 1) == pytest.approx(of_bayes_classifier(math.log(0.2 / 0.8), other), abs=0.02)


def test_by_hand_as_many_are_right_as_are_wanted_and_the_rest_wrong():
    said, there = torch.tensor([0, 0, 1, 0, 2, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 3)

    def right(share):
        found = match_answers(torch.rand(17, 3), labels, torch.eye(3)[said], there, share, generator=generator())
        return [int((found.argmax(1) == k)[labels == k].sum()) for k in range(3)]

    # of class 0, 4 of 6 are right, of 1, 1 of 2, of 2 the only one: there are no wrong answers to show
    assert right(1.0) == [6, 2, 3]  # 6 of 9; 2.5 of 5, so that 8.5 of 14 are 8; 3 of 3
    assert right(0.5) == [3, 1, 3]  # 3; 1.25, so that 4.25 are 4
    assert right(0.0) == [0, 0, 3]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_the_rounding_of_classes_does_not_add_up(share):
    probs, there = too_sure()
    labels = torch.arange(4).repeat(25)
    found = match_answers(torch.rand(100, 4), labels, probs, there, share, generator=generator())
    wanted = share * sum(25 * right_share(probs, there, k) for k in range(4))
    assert abs(int((found.argmax(1) == labels).sum()) - wanted) <= 0.5


def test_another_share_changes_no_more_answers_than_it_has_to():
    probs, there = too_sure()
    labels, views = torch.arange(4).repeat(25), torch.rand(100, 4)
    some, fewer = (match_answers(views, labels, probs, there, share, generator=generator()) for share in (0.9, 0.7))
    changed = sum(int((some == answer).all(1).sum() == 0) for answer in fewer)
    assert changed == int((some.argmax(1) == labels).sum() - (fewer.argmax(1) == labels).sum()) > 0
