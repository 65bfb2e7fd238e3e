"""The shared model: ResNet-18 with a class head and a client head on one embedding (paper, Section 4.1)."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS = ("large", "medium", "small")
NORMS = ("batch", "group")


Batch = tuple[Tensor, Tensor, Tensor]
"""Images [N, channels, H, W], class labels [N], client ids [N]."""


class Outputs(NamedTuple):
    """What the model says of N images."""

    class_logits: Tensor
    client_logits: Tensor | None
    embedding: Tensor


class TwoHeadResNet18(nn.Module):
    """ResNet-18 for small images (3x3 stem, no max-pool) whose embedding z feeds a class and a client head.

    With f = 8 width pooled features (512 at the paper's width 64) the head sizes are, each scaling with the width:
    `large`: z = f, heads f -> f/2 -> out; `medium`: z = f/2, heads f/2 -> f/4 -> out; `small`: z = f/4, heads
    f/4 -> f/8 -> out; a ReLU before every head's last layer.

    Args:
        num_classes: K.
        num_clients: C, or 0 for the single-head baseline, whose `client_logits` are None.
        width: channels of the first stage.
        head: `large`, `medium` or `small`.
        norm: `batch`, or `group` (GroupNorm of 8 channels a group, no running statistics).
        channels: of the images, 1 or 3.

    `forward` takes images [N, channels, H, W] and gives `(class_logits [N, K], client_logits [N, C], embedding
    [N, d])`.
    """

    def __init__(
        self,
        num_classes: int,
        num_clients: int,
        *,
        width: int = 64,
        head: str = "medium",
        norm: str = "batch",
        channels: int = 3,
    ) -> None:
        super().__init__()
        if head not in HEADS or norm not in NORMS:
            raise ValueError(f"head={head!r} is not one of {HEADS}, or norm={norm!r} not one of {NORMS}")
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(conv3x3(channels, width), normalisation(norm, width), nn.ReLU())
        self.stages = nn.Sequential(
            *(stage(before, after, norm) for before, after in zip([width, *widths], widths, strict=False))
        )
        features = widths[-1]
        size = features // {"large": 1, "medium": 2, "small": 4}[head]
        self.projection = nn.Identity() if head == "large" else nn.Linear(features, size)
        self.class_head = head_of(size, num_classes)
        self.client_head = head_of(size, num_clients) if num_clients else None
        self.register_buffer("pruned", torch.zeros(num_clients, dtype=torch.bool))

    def forward(self, images: Tensor) -> Outputs:
        """Class and client logits, and the embedding, of images [N, channels, H, W]."""
        features = self.stages(self.stem(images)).mean((2, 3))
        z = self.projection(features)
        client_logits = None
        if self.client_head is not None:
            client_logits = self.client_head(z).masked_fill(self.pruned, -torch.inf)
        return Outputs(self.class_head(z), client_logits, z)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., 2016)."""

    def __init__(self, before: int, after: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(before, after, stride)
        self.norm1 = normalisation(norm, after)
        self.conv2 = conv3x3(after, after)
        self.norm2 = normalisation(norm, after)
        self.shortcut = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), normalisation(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] -> [N, after, H / stride, W / stride]."""
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def stage(before: int, after: int, norm: str) -> nn.Sequential:
    """Two blocks; the first halves the resolution where the width grows."""
    return nn.Sequential(BasicBlock(before, after, after // before, norm), BasicBlock(after, after, 1, norm))


def conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution at stride 1."""
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def normalisation(norm: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm of 8 channels a group (one group where 8 does not divide the channels)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1 if channels % 8 else channels // 8, channels)


def head_of(size: int, outputs: int) -> nn.Sequential:
    """Two linear layers, the first half as wide as the embedding."""
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(size, size // 2), relu=nn.ReLU(), out=nn.Linear(size // 2, outputs))
    )
