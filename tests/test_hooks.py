from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fedunlearn.nn.hooks import layer_inputs


def model():
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layers[1].eval()  # one layer alone
    return layers


def test_every_input_of_the_given_kinds_is_shown_by_name():
    layers, x, seen = model(), torch.randn(5, 3), {}
    with layer_inputs(layers, (nn.Linear,), lambda name, layer, value: seen.update({name: (layer, value)})):
        layers(x)
    assert seen.keys() == {"0", "2"}
    assert seen["0"][0] is layers[0]
    assert torch.equal(seen["0"][1], x)
    assert torch.equal(seen["2"][1], layers[1](layers[0](x)))


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_go_and_every_module_gets_its_mode_again(fails):
    layers, seen = model(), []
    outcome = pytest.raises(ZeroDivisionError) if fails else nullcontext()
    with outcome, layer_inputs(layers, (nn.Linear,), lambda name, layer, value: seen.append(name)):
        layers.eval()
        layers(torch.randn(5, 3))
        _ = 1 / (0 if fails else 1)
    layers(torch.randn(5, 3))
    assert seen == ["0", "2"]
    assert [module.training for module in layers.modules()] == [True, True, False, True]
