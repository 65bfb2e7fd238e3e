r"""A network of your own: train and forget with it, in one file.

    PYTHONPATH=examples fedunlearn run digits model=own_model:separable \
      rounds=30 train.lr=0.05 train.crop_padding=0 'forget.schedule={25:[3]}'

That takes about a minute on two CPU cores. After 25 rounds the network gets 93% of the test images right, and 97% of
client 3's. Once client 3 is forgotten, it gets 89% of them. The retrained model is expected to get 84%.

Copy it, and put your layers in place of these. The network gives features [N, f] of images [N, channels, H, W], f being
what you like. A projection, a class head and a client head are added to it.
"""

import pytest
from torch import nn

import fedunlearn
from fedunlearn.cli import main


def separable(channels: int, width: int = 16, dropout: float = 0.1) -> nn.Module:
    """Make two depthwise separable convolutions without BatchNorm (Howard et al., 2017, "MobileNets").

    Args:
        channels: of the images; of `channels`, `image_size` and `num_classes` a factory gets those that it declares.
        width: of the first layer; `model.options={width:32}` sets it, as every other argument.
        dropout: before the features.
    """
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width), nn.Conv2d(width, 2 * width, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout),
    )  # fmt: skip


def test_a_run_trains_it_and_forgets_a_client(tmp_path):
    """Train two rounds, forget a client, and look at the model."""
    words = ["rounds=2", "clients=3", "data.limit=150", "forget.schedule={2:[1]}", "model.options={width:8}"]
    words += ["forget.gate=false", f"home={tmp_path}", "run=mine"]  # after two rounds a model knows too little to pass
    with pytest.raises(SystemExit) as ended:
        main(["run", "digits", "--engine", "local", f"model={__name__}:separable", *words])
    assert ended.value.code == 0
    run = fedunlearn.open_run("mine", home=str(tmp_path))
    assert list(run.requests().state) == ["COMPLETED"]
    state = run.model().state_dict()
    assert state["network.0.weight"].shape == (8, 1, 3, 3)
    assert state["projection.weight"].shape == (32, 64)  # of 2 * 8 channels at 2 * 2 positions
    assert state["pruned"].tolist() == [False, True, False]
