import math

import pytest
import torch
from torch.testing import assert_close

from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.sgd import LocalSGD

WEIGHTS = {"class_weight": 1.0, "client_weight": 0.5, "disentangle_weight": 0.1}
SGD = {"momentum": 0.9, "weight_decay": 1e-3}
RATE = 0.1


def batches():
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 3, 8, 8, generator=g), torch.randint(3, (6,), generator=g), torch.arange(6) % 2)
        for _ in range(2)
    ]


def two_models():
    torch.manual_seed(0)
    model, twin = (TwoHeadResNet18(3, 2, width=8) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    return model, twin


def fit(model, epochs, *, lr=RATE, precision="fp32", loss=WEIGHTS):
    return LocalSGD(model, **SGD, precision=precision, batch_size=6).fit(epochs, lr=lr, loss=loss)


def test_fit_is_sgd_written_out():
    model, twin = two_models()
    counts = fit(model, [batches(), batches()])

    velocity, loss_sum = {name: 0 for name, _ in twin.named_parameters()}, 0.0
    twin.train()
    for images, classes, clients in [*batches(), *batches()]:
        twin.zero_grad()
        loss = multi_task_loss(*twin(images), classes, clients, **WEIGHTS)
        loss.backward()
        loss_sum += 6 * loss.item()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                velocity[name] = SGD["momentum"] * velocity[name] + p.grad + SGD["weight_decay"] * p
                p -= RATE * velocity[name]
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-4, atol=1e-5)
    assert counts.examples == 24
    assert counts.loss == pytest.approx(loss_sum, rel=1e-4)


def test_every_fit_begins_anew():
    model, twin = two_models()
    local = LocalSGD(model, **SGD, precision="fp32", batch_size=6)
    class_alone = WEIGHTS | {"client_weight": 0.0, "disentangle_weight": 0.0}
    counts = [local.fit([batches()], lr=rate, loss=loss) for rate, loss in ((0.1, class_alone), (0.01, WEIGHTS))]
    expected = [fit(twin, [batches()], lr=rate, loss=loss) for rate, loss in ((0.1, class_alone), (0.01, WEIGHTS))]
    assert counts == expected
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=0, atol=0)


def test_frozen_parameters_stay():
    model, twin = two_models()
    frozen = [*model.client_head.parameters()]
    LocalSGD(model, **SGD, precision="fp32", batch_size=6, frozen=frozen).fit([batches()], lr=RATE, loss=WEIGHTS)
    for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(after, before) == name.startswith("client_head."), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_are_the_steps():
    model, twin = (m.cuda().double() for m in two_models())
    whole = [(images.cuda().double(), labels.cuda(), clients.cuda()) for images, labels, clients in batches()]
    there = [[tuple(value[:size] for value in batch) for batch in whole] for size in (6, 4)]
    replayed, stepped = (LocalSGD(m, **SGD, precision="fp32", batch_size=6) for m in (model, twin))
    stepped._replay = stepped._step
    for rate in (0.05, 0.02):
        counts = [local.fit(there, lr=rate, loss=WEIGHTS) for local in (replayed, stepped)]
        assert counts[0].examples == counts[1].examples == 20
        assert counts[0].loss == pytest.approx(counts[1].loss, rel=1e-9)
    assert replayed.replay
    assert_close(dict(model.state_dict()), dict(twin.state_dict()), rtol=1e-6, atol=1e-9)


def test_bf16_is_close_and_keeps_fp32_weights():
    model, twin = two_models()
    losses = [fit(m, [batches()], lr=0.01, precision=p).mean_loss for m, p in ((model, "fp32"), (twin, "bf16"))]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert math.isfinite(losses[1])
