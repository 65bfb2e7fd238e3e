import pytest
import torch
from torch.testing import assert_close

import reference
from fedunlearn.nn.losses import disentanglement_loss, multi_task_loss


def random_batch(n=40, clients=6, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 5, generator=g, dtype=torch.float64) * 0.3
    return z, torch.randint(clients, (n,), generator=g), torch.randint(classes, (n,), generator=g)


def test_value_by_hand():
    # client 0 at 0 and 2 (centroid 1), client 1 at 1.5: pull = (1 + 0) / 2, push = (1 - 0.5)^2
    z = torch.tensor([[0.0], [2.0], [1.5]])
    ids = torch.tensor([0, 0, 1])
    assert_close(disentanglement_loss(z, ids), torch.tensor(0.75))
    assert_close(disentanglement_loss(z, ids, pull=0, margin=3.0), torch.tensor(2.5**2))


@pytest.mark.parametrize("within_class", [False, True])
def test_equals_the_naive_loops_and_so_do_its_gradients(within_class):
    z, clients, classes = random_batch()
    settings = {"margin": 0.9, "pull": 0.7, "push": 1.3, "class_ids": classes if within_class else None}
    fast, slow = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss, expected = (
        disentanglement_loss(fast, clients, **settings),
        reference.disentanglement_loss(slow, clients, **settings),
    )
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, fast), torch.autograd.grad(expected, slow))


def test_one_client_has_no_push():
    z, _, _ = random_batch()
    assert disentanglement_loss(z, torch.zeros(len(z), dtype=torch.long), pull=0) == 0


def test_centroids_further_apart_than_the_margin_do_not_repel_each_other():
    z, ids = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([0, 1])
    assert disentanglement_loss(z, ids, margin=4.9) == 0
    assert disentanglement_loss(z, ids, margin=5.5) == pytest.approx(0.25)


def test_coinciding_centroids_give_finite_gradients():
    z = torch.zeros(4, 3, requires_grad=True)
    disentanglement_loss(z, torch.tensor([0, 0, 1, 1])).backward()
    assert torch.isfinite(z.grad).all()


def test_multi_task_loss_is_the_weighted_sum_and_zero_weights_keep_the_class_loss():
    z, clients, classes = random_batch()
    class_logits, client_logits = torch.randn(len(z), 4), torch.randn(len(z), 6)
    parts = {"class_weight": 0, "client_weight": 0, "disentangle_weight": 0}
    args = (class_logits, client_logits, z, classes, clients)
    alone = {name: multi_task_loss(*args, **(parts | {name: 1.0})) for name in parts}
    total = multi_task_loss(*args, class_weight=2, client_weight=3, disentangle_weight=0.5)
    assert_close(
        total,
        2 * alone["class_weight"] + 3 * alone["client_weight"] + 0.5 * alone["disentangle_weight"],
        check_dtype=False,
    )
    assert_close(alone["class_weight"], torch.nn.functional.cross_entropy(class_logits, classes))
    assert_close(alone["client_weight"], torch.nn.functional.cross_entropy(client_logits, clients))
