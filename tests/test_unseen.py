import itertools

import pytest
import torch
from torch.testing import assert_close

from fedunlearn.unseen import match_answers


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
