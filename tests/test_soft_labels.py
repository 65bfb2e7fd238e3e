import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedunlearn.nn.augment import shifted
from fedunlearn.unlearning.soft_labels import SHIFTS, assign_soft_labels, augmented_views


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def overconfident(times=3.0):
    """Probabilities of a model that is so many times overconfident, and the labels of its images."""
    draws = generator(3)
    logits = torch.randn(4000, 4, generator=draws)
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    return (times * logits).softmax(1), labels


def accuracy_on(probs, labels, k):
    """The class accuracy on images of class k."""
    return float((probs.argmax(1) == k)[labels == k].double().mean())


def test_by_hand_the_pairs_with_the_largest_sum_of_products_meet():
    views = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    predictions = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    found = assign_soft_labels(views, torch.tensor([0, 0]), predictions, torch.tensor([0, 0]), generator=generator())
    assert_close(found, predictions[[1, 0]])


def test_it_is_the_best_of_all_pairings_within_each_class():
    torch.manual_seed(1)
    views, predictions = torch.rand(8, 3).softmax(1), torch.rand(8, 3).softmax(1)
    labels = torch.tensor([0, 1] * 4)
    found = assign_soft_labels(views, labels, predictions, labels, generator=generator())
    for k in (0, 1):
        v, a = views[labels == k], predictions[labels == k]
        best = max(float((v * a[list(order)]).sum()) for order in itertools.permutations(range(4)))
        assert float((v * found[labels == k]).sum()) == pytest.approx(best)


def test_every_prediction_is_taken_once_before_any_comes_again():
    predictions, labels = torch.eye(5)[:3], torch.zeros(7, dtype=torch.int64)
    found = assign_soft_labels(
        torch.rand(7, 5), labels, predictions, torch.zeros(3, dtype=torch.int64), generator=generator()
    )
    assert sorted(found.sum(0).tolist()) == [0, 0, 2, 2, 3]


def test_accuracy_and_confidence_are_those_of_held_out_images():
    torch.manual_seed(2)
    labels = torch.arange(4).repeat(50)
    predictions = torch.randn(200, 4).mul(2).softmax(1)
    found = assign_soft_labels(torch.rand(200, 4), labels, predictions, labels, generator=generator())
    assert (found.argmax(1) == labels).sum() == (predictions.argmax(1) == labels).sum()
    assert_close(found.amax(1).sort().values, predictions.amax(1).sort().values)


def test_a_class_without_held_out_images_takes_predictions_of_all_classes():
    predictions = torch.tensor([[0.5, 0.5]])
    found = assign_soft_labels(
        torch.rand(2, 2), torch.tensor([0, 1]), predictions, torch.tensor([0]), generator=generator()
    )
    assert_close(found, predictions.expand(2, 2))


def test_by_hand_as_many_are_correct_as_are_wanted_and_the_rest_wrong():
    predicted, there = torch.tensor([0, 0, 1, 0, 2, 0, 1, 2, 2]), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
    labels = torch.tensor([0] * 9 + [1] * 5 + [2] * 3)

    def correct(fraction):
        found = assign_soft_labels(
            torch.rand(17, 3), labels, torch.eye(3)[predicted], there, fraction, generator=generator()
        )
        return [int((found.argmax(1) == k)[labels == k].sum()) for k in range(3)]

    # of class 0, 4 of 6 are right, of 1, 1 of 2, of 2 the only one: there are no wrong predictions to take
    assert correct(1.0) == [6, 2, 3]  # 6 of 9; 2.5 of 5, so that 8.5 of 14 are 8; 3 of 3
    assert correct(0.5) == [3, 1, 3]  # 3; 1.25, so that 4.25 are 4
    assert correct(0.0) == [0, 0, 3]


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9, 1.0])
def test_the_rounding_of_classes_does_not_add_up(fraction):
    probs, there = overconfident()
    labels = torch.arange(4).repeat(25)
    found = assign_soft_labels(torch.rand(100, 4), labels, probs, there, fraction, generator=generator())
    wanted = fraction * sum(25 * accuracy_on(probs, there, k) for k in range(4))
    assert abs(int((found.argmax(1) == labels).sum()) - wanted) <= 0.5


def test_another_fraction_changes_no_more_soft_labels_than_it_has_to():
    probs, there = overconfident()
    labels, views = torch.arange(4).repeat(25), torch.rand(100, 4)
    some, fewer = (
        assign_soft_labels(views, labels, probs, there, fraction, generator=generator()) for fraction in (0.9, 0.7)
    )
    changed = sum(int((some == row).all(1).sum() == 0) for row in fewer)
    assert changed == int((some.argmax(1) == labels).sum() - (fewer.argmax(1) == labels).sum()) > 0


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    held_out=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    fraction=st.floats(0, 1),
)
def test_no_row_is_lost_and_as_many_are_correct_as_are_wanted(seed, labels, held_out, fraction):
    draws, own, there = torch.Generator().manual_seed(seed), torch.tensor(labels), torch.tensor(held_out)
    views, predictions = (torch.rand(n, 4, generator=draws).softmax(1) for n in (len(own), len(there)))
    found = assign_soft_labels(views, own, predictions, there, fraction, generator=draws)
    assert found.shape == views.shape
    rows = {tuple(row) for row in predictions.tolist()}
    assert all(tuple(row) in rows for row in found.tolist())
    wanted = correct = 0.0
    for k in set(labels):
        pool = predictions[there == k] if k in held_out else predictions
        hits, count = (pool.argmax(1) == k).double().mean().item(), labels.count(k)
        wanted += count if hits == 1 else fraction * hits * count
        correct += int((found[own == k].argmax(1) == k).sum())
    assert abs(correct - wanted) <= 0.5 + 1e-9


def test_views_are_shifted_by_a_sixteenth_and_mirrored():
    images = torch.randint(256, (3, 32, 32, 3), generator=generator(), dtype=torch.uint8)
    plain, mirrored = ([*augmented_views(images, mirror=mirror)] for mirror in (False, True))
    assert all(
        torch.equal(view, shifted(images, 2 * down, 2 * right, 0))
        for view, (down, right) in zip(plain, SHIFTS, strict=True)
    )
    assert len(mirrored) == 8
    assert all(torch.equal(mirrored[2 * i], view) for i, view in enumerate(plain))
    assert all(torch.equal(mirrored[2 * i + 1], view.flip(2)) for i, view in enumerate(plain))


def test_small_images_are_shifted_by_one_pixel():
    images = torch.ones(1, 8, 8, 1, dtype=torch.uint8)
    assert [int(view.sum()) for view in augmented_views(images, mirror=False)] == [56] * 4


def test_rows_of_a_table_are_their_only_view():
    rows = torch.randn(5, 1, 7)
    (view,) = augmented_views(rows, mirror=True)
    assert view is rows
