import pytest
import torch

from fedunlearn.nn.model import TwoHeadResNet18


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("head_size", "size", "hidden"), [("large", 512, 256), ("medium", 256, 128), ("small", 128, 64)]
)
def test_head_sizes_at_the_papers_width(head_size, size, hidden):
    model = TwoHeadResNet18(10, 10, head_size=head_size)
    assert model.class_head.hidden.in_features == size
    assert model.class_head.out.in_features == model.client_head.out.in_features == hidden
    projection = 0 if head_size == "large" else 512 * size + size
    heads = 2 * (size * hidden + hidden + hidden * 10 + 10)
    backbone = 11_168_832  # ResNet-18 with a 3x3 stem, without its fully connected layer
    assert parameters(model) == backbone + projection + heads


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("width", [8, 11])
def test_shapes(norm, channels, width):
    model = TwoHeadResNet18(7, 4, width=width, norm=norm, channels=channels)
    out = model(torch.randn(5, channels, 8, 8))
    assert (out.class_logits.shape, out.client_logits.shape, out.embedding.shape) == ((5, 7), (5, 4), (5, 4 * width))


def test_resolution_is_halved_three_times():
    model = TwoHeadResNet18(10, 10, width=8)
    assert model.stages(model.stem(torch.randn(1, 3, 32, 32))).shape == (1, 64, 4, 4)


def test_single_head_has_no_client_logits_and_no_client_weights():
    model = TwoHeadResNet18(10, 0, width=8)
    assert model(torch.randn(2, 3, 8, 8)).client_logits is None
    assert not [name for name in model.state_dict() if name.startswith("client_head")]


def test_group_norm_has_no_running_statistics():
    assert not [n for n in TwoHeadResNet18(10, 10, width=8, norm="group").state_dict() if "running" in n]


def test_an_unknown_head_size_is_refused():
    with pytest.raises(ValueError, match="head_size='huge'"):
        TwoHeadResNet18(10, 10, head_size="huge")
