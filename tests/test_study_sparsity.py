import pytest
import torch

from fedunlearn.study.pooled.sparsity import METHODS, most_sensitive, prune_weights


def named(stem, head):
    return {"stem.w": torch.tensor(stem), "class_head.w": torch.tensor(head)}


FORGET, RETAIN = named([4.0, 1.0, 0.0, 2.0], [9.0, 9.0]), named([1.0, 1.0, 0.0, 4.0], [1.0, 1.0])


def test_most_sensitive_by_hand():
    # ratios 4, 1, undefined, 0.5: heads are never chosen, what matters to neither comes last
    assert most_sensitive(FORGET, RETAIN, 0.25)["stem.w"].tolist() == [1, 0, 0, 0]
    assert most_sensitive(FORGET, RETAIN, 0.75)["stem.w"].tolist() == [1, 1, 0, 1]
    assert most_sensitive(RETAIN, FORGET, 0.5)["stem.w"].tolist() == [0, 1, 0, 1]
    assert not most_sensitive(FORGET, RETAIN, 0.75)["class_head.w"].any()


def test_a_weight_that_matters_to_one_side_alone_comes_first():
    forget, retain = named([0.0, 1.0, 5.0, 0.0], [0.0, 0.0]), named([1.0, 0.0, 1.0, 0.0], [0.0, 0.0])
    assert most_sensitive(forget, retain, 0.25)["stem.w"].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_pruned_and_what_is_tuned(method, heads):
    params, initial = named([1.0, 2.0, 3.0, 4.0], [5.0, 6.0]), named([-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0])
    forget, retain = named([1.0, 0, 0, 0], [0.0, 0]), named([1.0, 0, 0, 1], [0.0, 0])
    pruned, masks = prune_weights(method, params, initial, forget, retain, heads=heads)
    expected = {
        "DeepClean": ([0, 2, 3, 4], [1, 0, 0, 0]),
        "retain-sensitive": ([0, 2, 3, 4], [0, 0, 0, 1]),
        "lottery ticket": ([0, 2, 3, -4], [0, 0, 0, 1]),
    }
    assert (pruned["stem.w"].tolist(), masks["stem.w"].tolist()) == expected[method]
    assert pruned["class_head.w"].tolist() == [5, 6]
    assert masks["class_head.w"].tolist() == [heads, heads]
    assert params["stem.w"].tolist() == [1, 2, 3, 4]
