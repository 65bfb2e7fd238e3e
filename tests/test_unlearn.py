import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning import batch_norm, dampening
from fedunlearn.unlearning.dampening import dampen
from fedunlearn.unlearning.fisher import diagonal_fisher


def images(n=24, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_step_dampens_every_parameter_and_prunes():
    torch.manual_seed(0)
    model = TwoHeadResNet18(3, 4, width=8)
    labels = torch.arange(24)
    full = diagonal_fisher(model, [(images(), labels % 3, labels % 4)])
    forget = diagonal_fisher(model, [(images(6), labels[:6] % 3, labels[:6] * 0)])
    expected = dampen({n: p.detach().clone() for n, p in model.named_parameters()}, full, forget, alpha=1, lambda_=0.5)
    dampening.step(model, full, forget, [0], alpha=1, lambda_=0.5)
    for row in ("client_head.out.weight", "client_head.out.bias"):
        expected[row][0] = 0
    assert_close({n: p.detach() for n, p in model.named_parameters()}, expected)
    assert model.pruned.tolist() == [True, False, False, False]


def test_moments_give_the_mean_and_variance_of_all_the_data():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    data = 5 + 2 * images(40)
    moments = [batch_norm.batch_moments(layer, [part]) for part in data.split([7, 13, 20])]
    batch_norm.recalibrate(layer, {"0": sum(m["0"] for m in moments)})
    assert_close(layer[0].running_mean, data.mean((0, 2, 3)))
    assert_close(layer[0].running_var, data.var((0, 2, 3)))


def test_one_batch_gives_what_a_training_pass_with_momentum_one_gives():
    torch.manual_seed(0)
    model, twin = (TwoHeadResNet18(3, 4, width=8) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    batch_norm.recalibrate(model, batch_norm.batch_moments(model, [images()]))
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    twin.train()(images())
    statistics = [name for name in model.state_dict() if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 40
    for name in statistics:
        assert_close(model.state_dict()[name], twin.state_dict()[name])


def test_taking_moments_leaves_the_model_as_it_was():
    model = TwoHeadResNet18(3, 4, width=8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch_norm.batch_moments(model, [images()])
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_group_norm_has_no_moments_and_impossible_ones_are_refused():
    assert batch_norm.batch_moments(TwoHeadResNet18(3, 4, width=8, norm="group"), [images()]) == {}
    layer = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="fewer than two values"):
        batch_norm.recalibrate(layer, {"0": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="moments of"):
        batch_norm.recalibrate(layer, {})
