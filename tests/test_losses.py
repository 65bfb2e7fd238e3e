import re

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import reference
from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.nn.losses import check_loss, disentanglement_loss, multi_task_loss
from fedunlearn.nn.model import Outputs


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


# --- losses of one's own -------------------------------------------------------------------------------------------


def mean(class_logits, client_logits, embeddings, class_ids, client_ids, **weights):
    return cross_entropy(class_logits, class_ids)


def vector(class_logits, client_logits, embeddings, class_ids, client_ids, **weights):
    return cross_entropy(class_logits, class_ids, reduction="none")


def without_weights(class_logits, client_logits, embeddings, class_ids, client_ids):
    return cross_entropy(class_logits, class_ids)


def raises(class_logits, *batch, **weights):
    raise RuntimeError("two\nlines")


REFUSED = [
    (vector, r"of 6 images it gives float32 \[6\], and not one number: take the mean over the batch"),
    (lambda z, *batch, **weights: z.sum().reshape(1), r"it gives float32 \[1\], and not one number"),
    (lambda z, *batch, **weights: z.argmax(), r"it gives int64 \[\], and not one number"),
    (lambda z, *batch, **weights: z.sum().item(), "it gives a float, and no tensor"),
    (lambda z, *batch, **weights: None, "it gives a NoneType, and no tensor"),
    (lambda z, *batch, **weights: z.sum().detach(), "it has no gradient"),
    (lambda z, *batch, **weights: torch.ones((), requires_grad=True), "its gradient reaches no weight"),
    (lambda z, *batch, **weights: z.sum() * torch.nan, "it gives nan on 6 held-out images"),
    (lambda z, *batch, **weights: (z - z.detach()).square().sum().sqrt(), "its gradients are not finite"),
    (
        without_weights,
        r"TypeError: without_weights\(\) got an unexpected keyword argument 'margin' \(it is called with",
    ),
    (lambda a, b: a.sum(), "TypeError: .* class_logits, client_logits, embeddings, class_ids, client_ids, and by name"),
    (raises, r"^RuntimeError: two \(it is called"),
]


@pytest.mark.parametrize(("function", "reason"), REFUSED)
def test_a_loss_that_nothing_can_be_trained_on_is_refused_with_the_reason(function, reason):
    with pytest.raises(UserError, match=reason) as refused:
        tried(function)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("function", [mean, multi_task_loss])
def test_a_sound_loss_passes(function):
    assert tried(function) is None


def tried(function):
    weight = torch.linspace(-1, 1, 12).reshape(4, 3).requires_grad_()
    logits = torch.linspace(-1, 1, 24).reshape(6, 4) @ weight
    ids = torch.arange(6) % 3
    outputs = Outputs(logits, None, torch.zeros(6, 2))
    return check_loss(function, outputs, ids, torch.zeros_like(ids), params=[weight], weights={"margin": 1.0})


@pytest.mark.parametrize("where", ["run", "forget"])
def test_a_run_or_a_request_with_such_a_loss_does_not_begin(federate, capsys, monkeypatch, where):
    about = f"train.loss={__name__}:vector" if where == "run" else f"train.loss={__name__}:mean strategy=leave rounds=1"
    expected = rf"train\.loss={__name__}:vector: of \d+ images it gives float32 \[\d+\], and not one number"
    if where == "run":
        with pytest.raises(UserError, match=expected):
            federate(about)
        assert not federate.folder().exists()
        return
    federate(about)
    monkeypatch.setitem(globals(), "mean", vector)
    assert command("forget", "--run", "test", "--client", "1", "--dry-run") == 2
    assert re.search(expected.replace("vector", "mean"), capsys.readouterr().err)
