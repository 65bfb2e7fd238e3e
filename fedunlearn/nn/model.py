"""Define the shared model: a network, ResNet-18 by default, with a class head and a client head on one embedding."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

HEAD_SIZES = {"large": 1, "medium": 2, "small": 4}
"""How many times fewer dimensions the embedding has than the network's features."""
NORMS = ("batch", "group", "none")
HEADS = ("projection.", "class_head.", "client_head.")
"""How the names of parameters begin that are not the network's."""
NEVER = -1e4
"""The logit of a pruned class: its probability is 0, and 0 times its logarithm too."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Images [N, channels, H, W], class labels [N], client ids [N]."""


class Outputs(NamedTuple):
    """Collect what the model computes for N images.

    Attributes:
        class_logits: [N, K].
        client_logits: [N, C], or None without a client head.
        embedding: z, [N, d].
    """

    class_logits: Tensor
    client_logits: Tensor | None
    embedding: Tensor


class TwoHeadModel(nn.Module):
    """Classify images by class and by client, from one embedding z (paper, Section 4.1), on top of any network.

    The network gives f features an image. The head size decides what follows, and scales with f:

    - `large`: z has f dimensions, the heads are f -> f/2 -> out;
    - `medium`: z has f/2, the heads are f/2 -> f/4 -> out;
    - `small`: z has f/4, the heads are f/4 -> f/8 -> out.

    A ReLU stands before every head's last layer.

    Args:
        parts: the network, as modules by name that run one after another. The last gives features [N, f], or a tuple
            whose first entry they are.
        features: f.
        num_classes: K.
        num_clients: C, or 0 for the single-head baseline, whose `client_logits` are None.
        head_size: `large`, `medium` or `small`.
        plain: whether the network takes images in plain memory order alone, as one that calls `view` on maps does.

    Attributes:
        pruned: bool [C], the clients whose logits are minus infinity (`unlearning.pruning`).
        pruned_classes: bool [K], the classes whose logits are `NEVER`.

    Raises:
        ValueError: an unknown head size, or too few features for it.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Tanh())
        >>> model = TwoHeadModel({"network": network}, features=16, num_classes=10, num_clients=4)
        >>> [tuple(output.shape) for output in model(torch.zeros(2, 3, 8, 8))]
        [(2, 10), (2, 4), (2, 8)]
    """

    pruned: Tensor
    pruned_classes: Tensor

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        *,
        features: int,
        num_classes: int,
        num_clients: int,
        head_size: str = "medium",
        plain: bool = False,
    ) -> None:
        super().__init__()
        if head_size not in HEAD_SIZES:
            raise ValueError(f"head_size={head_size!r} is not one of {', '.join(HEAD_SIZES)}")
        size = features // HEAD_SIZES[head_size]
        if size < 2:
            raise ValueError(f"{features} features are too few for head_size={head_size!r}")
        self._parts, self.plain = tuple(parts), plain
        for name, part in parts.items():
            self.add_module(name, part)
        self.projection = nn.Identity() if size == features else nn.Linear(features, size)
        self.class_head = Head(size, num_classes)
        self.client_head = Head(size, num_clients) if num_clients else None
        self.register_buffer("pruned", torch.zeros(num_clients, dtype=torch.bool))
        self.register_buffer("pruned_classes", torch.zeros(num_classes, dtype=torch.bool))
        self._further_names = further_names(self)
        if self._further_names:
            self.register_state_dict_post_hook(_once)
            self.register_load_state_dict_pre_hook(_everywhere)

    def forward(self, images: Tensor) -> Outputs:
        """Compute class logits, client logits and the embedding of images [N, channels, H, W]."""
        features = images.contiguous() if self.plain else images
        for name in self._parts:
            features = getattr(self, name)(features)
        z = self.projection(first_of(features))
        client_logits = None
        if self.client_head is not None:
            client_logits = self.client_head(z).masked_fill(self.pruned, -torch.inf)
        return Outputs(self.class_head(z).masked_fill(self.pruned_classes, NEVER), client_logits, z)

    def first_weights(self) -> nn.Parameter:
        """Give the weights of the network's first layer, first in the order in which its modules were made."""
        layers = {name: p for name, p in self.named_parameters() if p.ndim > 1}
        return next((p for name, p in layers.items() if name.endswith(".weight")), next(iter(layers.values())))


class TwoHeadResNet18(TwoHeadModel):
    """Classify small images by ResNet-18 with a 3x3 stem and no max-pool (paper, Section 4.1).

    It has f = 8 width pooled features, 512 at the paper's width of 64.

    Args:
        num_classes, num_clients, head_size: of `TwoHeadModel`.
        width: channels of the first stage.
        norm: `batch`, `group` (GroupNorm of 8 channels a group, no running statistics) or `none`.
        channels: of the images, 1 or 3.

    Raises:
        ValueError: an unknown head size or norm.

    Example:
        >>> model = TwoHeadResNet18(num_classes=10, num_clients=4, width=8)
        >>> [tuple(output.shape) for output in model(torch.zeros(2, 3, 32, 32))]
        [(2, 10), (2, 4), (2, 32)]
    """

    def __init__(
        self,
        num_classes: int,
        num_clients: int,
        *,
        width: int = 64,
        head_size: str = "medium",
        norm: str = "batch",
        channels: int = 3,
    ) -> None:
        widths = [width, 2 * width, 4 * width, 8 * width]
        stem = nn.Sequential(conv3x3(channels, width), normalisation(norm, width), nn.ReLU())
        stages = (stage(before, after, norm) for before, after in zip([width, *widths], widths, strict=False))
        super().__init__(
            {"stem": stem, "stages": nn.Sequential(*stages), "pool": MeanOverPositions()},
            features=widths[-1],
            num_classes=num_classes,
            num_clients=num_clients,
            head_size=head_size,
        )


def further_names(model: nn.Module) -> dict[str, str]:
    """Give the first name of every tensor of a model that has several, by each of the others.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> further_names(nn.Sequential(layer, nn.ReLU(), layer))
        {'2.weight': '0.weight'}
    """
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return {name: known for name, tensor in tensors if (known := first.setdefault(id(tensor), name)) != name}


def _once(model: TwoHeadModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave out of a state what it has under another name: who changes one of two would change none."""
    for name in model._further_names:
        state.pop(prefix + name, None)  # buffers need not be in it


def _everywhere(model: TwoHeadModel, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give what a state has under the first name of a tensor under all of its names."""
    state |= {
        prefix + name: state[prefix + first] for name, first in model._further_names.items() if prefix + first in state
    }


def first_of(output: Any) -> Any:
    """Give a module's output, or the first where it has several."""
    return output[0] if isinstance(output, tuple | list) and output else output


class MeanOverPositions(nn.Module):
    """Average maps [N, channels, H, W] over positions, to features [N, channels]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Average over height and width."""
        return maps.mean((2, 3))


class Head(nn.Sequential):
    """Map an embedding to logits by two linear layers, the first half as wide as the embedding.

    Args:
        size: d, of the embedding.
        outputs: K or C.
    """

    hidden: nn.Linear
    out: nn.Linear

    def __init__(self, size: int, outputs: int) -> None:
        layers = {"hidden": nn.Linear(size, size // 2), "relu": nn.ReLU(), "out": nn.Linear(size // 2, outputs)}
        super().__init__(OrderedDict[str, nn.Module](layers))


class BasicBlock(nn.Module):
    """Apply two 3x3 convolutions with a shortcut (He et al., 2016, "Deep residual learning", Section 3)."""

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
        """Map [N, before, H, W] to [N, after, H / stride, W / stride]."""
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def stage(before: int, after: int, norm: str) -> nn.Sequential:
    """Make two blocks; the first halves the resolution where the width grows."""
    return nn.Sequential(BasicBlock(before, after, after // before, norm), BasicBlock(after, after, 1, norm))


def conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    """Make a 3x3 convolution without bias, which keeps the resolution at stride 1."""
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)


def normalisation(norm: str, channels: int) -> nn.Module:
    """Make BatchNorm, GroupNorm of 8 channels a group (one group where 8 does not divide the channels), or nothing."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is not one of {', '.join(NORMS)}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(1 if channels % 8 else channels // 8, channels) if norm == "group" else nn.Identity()
