import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning import batch_norm


def images(n=24, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_statistics_give_the_mean_and_variance_of_all_the_data():
    layer = nn.Sequential(nn.BatchNorm2d(3))
    data = 5 + 2 * images(40)
    parts = [batch_norm.batch_statistics(layer, [part]) for part in data.split([7, 13, 20])]
    batch_norm.recalibrate(layer, {"0": sum(m["0"] for m in parts)})
    assert_close(layer[0].running_mean, data.mean((0, 2, 3)))
    assert_close(layer[0].running_var, data.var((0, 2, 3)))


def test_one_batch_gives_what_a_training_pass_with_momentum_one_gives():
    torch.manual_seed(0)
    model, twin = (TwoHeadResNet18(3, 4, width=8) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    batch_norm.recalibrate(model, batch_norm.batch_statistics(model, [images()]))
    for layer in twin.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    twin.train()(images())
    statistics = [name for name in model.state_dict() if name.endswith(("running_mean", "running_var"))]
    assert len(statistics) == 40
    for name in statistics:
        assert_close(model.state_dict()[name], twin.state_dict()[name])


def test_the_model_is_as_before():
    model = TwoHeadResNet18(3, 4, width=8).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch_norm.batch_statistics(model, [images()])
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_group_norm_has_no_statistics_and_impossible_ones_are_refused():
    assert batch_norm.batch_statistics(TwoHeadResNet18(3, 4, width=8, norm="group"), [images()]) == {}
    layer = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="fewer than two values"):
        batch_norm.recalibrate(layer, {"0": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="statistics of"):
        batch_norm.recalibrate(layer, {})


def test_no_statistics_have_the_shapes_of_some_and_change_no_sum():
    model = TwoHeadResNet18(3, 4, width=8)
    some, none = batch_norm.batch_statistics(model, [images()]), batch_norm.no_statistics(model)
    assert_close({name: value + none[name] for name, value in some.items()}, some, rtol=0, atol=0)
    assert_close(batch_norm.batch_statistics(model, []), none)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.BatchNorm1d(3), (3,)), (nn.BatchNorm1d(3), (3, 5)), (nn.BatchNorm3d(3), (3, 2, 3, 4))]
)
def test_layers_of_any_number_of_dimensions(layer, shape):
    model, data = nn.Sequential(layer), torch.randn(20, *shape) + 1
    batch_norm.recalibrate(model, batch_norm.batch_statistics(model, [data]))
    values = data.transpose(0, 1).flatten(1)
    assert_close(layer.running_mean, values.mean(1))
    assert_close(layer.running_var, values.var(1))


def test_nothing_drops_out_meanwhile():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    found = batch_norm.batch_statistics(model, [images()])["1"]
    assert_close(found[1], images().sum((0, 2, 3)).double(), rtol=1e-4, atol=1e-4)
    assert all(module.training for module in model.modules())
