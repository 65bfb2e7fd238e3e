"""Closed rules for squares of single examples' gradients, of the layers for which there is one.

A rule is given what went into a layer, and the gradient of the sum of the examples' losses by what came out. It adds,
for each of the layer's parameters, the sum over examples i of (d loss_i / d theta)^2. The gradients of a whole batch
are never in memory at once.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm, pad

from fedunlearn.nn.precision import at_least_fp32
from fedunlearn.unlearning import fisher_triton

Sums = Mapping[str, Tensor]
Rule = Callable[[Sums, Any, Tensor, Tensor], None]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

TILE_ELEMENTS = 2**20
"""Elements of gradients that are computed at once: they should stay in a core's cache."""
TILE_ELEMENTS_GPU = 2**25


def rule_of(layer: nn.Module) -> Rule | None:
    """Give the rule of a layer, or None where it is unknown what the layer does with its parameters.

    A subclass has its rule where it runs as its parent does. Hooks and parametrisations could change anything.
    """
    kind = next((kind for kind in _RULES if isinstance(layer, kind)), None)
    own = layer._parameters
    if kind is None or type(layer).forward is not kind.forward or own.get("weight") is None:
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or not own.keys() <= {"weight", "bias"}:
        return None
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return None
    return _RULES[kind]


def is_example_wise(layer: nn.Module, activation: Tensor, examples: int) -> bool:
    """Whether what goes into a layer is [examples, ...], with as many dimensions as its rule needs."""
    least = 2
    if isinstance(layer, _CONVOLUTIONS):
        least = 2 + len(layer.kernel_size)
    elif isinstance(layer, nn.LayerNorm):
        least = 1 + len(layer.normalized_shape)
    elif isinstance(layer, nn.Embedding):
        least = 1
    return activation.ndim >= least and len(activation) == examples


def add_linear(sums: Sums, layer: nn.Linear, activation: Tensor, delta: Tensor) -> None:
    """Add of a linear layer; with positions p, as of tokens, (sum over p of delta_i,p a_i,p^T)^2."""
    if delta.ndim > 2:
        _add_products(sums["weight"], at_least_fp32(delta).flatten(1, -2), at_least_fp32(activation).flatten(1, -2))
        if layer.bias is not None:
            sums["bias"].add_(at_least_fp32(delta).flatten(1, -2).sum(1).square().sum(0))
        return
    squared = at_least_fp32(delta).square()
    sums["weight"].addmm_(squared.T, at_least_fp32(activation).square())  # (delta_i a_i^T)^2 is one matrix product
    if layer.bias is not None:
        sums["bias"].add_(squared.sum(0))


def _add_products(sums: Tensor, delta: Tensor, activation: Tensor) -> None:
    """Add (delta_i^T a_i)^2 of [N, P, out] and [N, P, in], as many examples at once as fit a tile."""
    for d, a in zip(*(part.split(_tile(sums)) for part in (delta, activation)), strict=True):
        sums += torch.bmm(d.transpose(1, 2), a).square_().sum(0)


def _tile(parameter: Tensor) -> int:
    """Say how many gradients of a parameter are computed at once."""
    return max(1, (TILE_ELEMENTS_GPU if parameter.is_cuda else TILE_ELEMENTS) // parameter.numel())


def add_convolution(sums: Sums, layer: Convolution, activation: Tensor, delta: Tensor) -> None:
    """Add (sum over positions p of delta_i,p a_i,p^T)^2 of a convolution, a_i,p being what its kernel sees at p."""
    activation, padding = padded(layer, activation)
    by_triton = fisher_triton.available(delta.device) and delta.dtype in (torch.float32, torch.bfloat16)
    if layer.groups > 1:
        _add_grouped(sums["weight"], layer, activation, delta, padding)
    elif by_triton and isinstance(layer, nn.Conv2d):
        sums["weight"].add_(
            fisher_triton.conv_squares(
                activation.to(delta.dtype),
                delta,
                kernel_size=_pair(layer.kernel_size),
                stride=_pair(layer.stride),
                padding=_pair(padding),
                dilation=_pair(layer.dilation),
                input_precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
            )
        )
    else:
        _add_in_tiles(sums["weight"], layer, at_least_fp32(activation), at_least_fp32(delta), padding)
    if layer.bias is not None:
        sums["bias"].add_(at_least_fp32(delta).sum(_positions(delta)).square().sum(0))


def padded(layer: Convolution, activation: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad an input where a layer does it by anything but so many zeros; gives it with the padding that is left."""
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return activation, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(activation, layer._reversed_padding_repeated_twice, mode), (0,) * len(layer.kernel_size)


def _pair(geometry: tuple[int, ...]) -> tuple[int, int]:
    return cast("tuple[int, int]", geometry)


def _positions(values: Tensor) -> tuple[int, ...]:
    """Give the dimensions after examples and channels."""
    return tuple(range(2, values.ndim))


def _add_in_tiles(
    sums: Tensor, layer: Convolution, activation: Tensor, delta: Tensor, padding: tuple[int, ...]
) -> None:
    """Compute one gradient for each example and tile of output channels, and square it while it is in the cache."""
    tiles = 2 ** max(0, math.ceil(math.log2(layer.weight.numel() / TILE_ELEMENTS)))
    rows = math.ceil(layer.out_channels / tiles)
    for total, weight, d in zip(sums.split(rows), layer.weight.split(rows), delta.split(rows, dim=1), strict=True):
        for a_i, d_i in zip(activation.split(1), d.split(1), strict=True):
            gradient = _weight_gradient(layer, weight, a_i, d_i, padding)
            total.addcmul_(gradient, gradient)


def _weight_gradient(
    layer: Convolution, weight: Tensor, activation: Tensor, delta: Tensor, padding: tuple[int, ...]
) -> Tensor:
    """Compute `torch.nn.grad.conv2d_weight` of the output channels that `delta` has, in the weight's memory order."""
    geometry = (layer.stride, padding, layer.dilation, False, (0,) * len(padding), 1)
    return torch.ops.aten.convolution_backward(delta, activation, weight, None, *geometry, (False, True, False))[1]


def _add_grouped(sums: Tensor, layer: Convolution, activation: Tensor, delta: Tensor, padding: tuple[int, ...]) -> None:
    """Add of a convolution with groups: at each place of the kernel, a product over positions in each group."""
    wide = pad(at_least_fp32(activation), [edge for side in reversed(padding) for edge in (side, side)])
    d = at_least_fp32(delta).flatten(2).unflatten(1, (layer.groups, -1))
    sizes = delta.shape[2:]
    for place in itertools.product(*map(range, layer.kernel_size)):
        seen = wide
        for dim, (at, step, spread, size) in enumerate(zip(place, layer.stride, layer.dilation, sizes, strict=True), 2):
            start = at * spread
            seen = seen.narrow(dim, start, (size - 1) * step + 1)[(slice(None),) * dim + (slice(None, None, step),)]
        a = seen.flatten(2).unflatten(1, (layer.groups, -1))
        gradients = torch.einsum("ngop,ngip->ngoi", d, a).flatten(1, 2)
        sums[(slice(None), slice(None), *place)] += gradients.square().sum(0)


def add_batch_norm(sums: Sums, layer: nn.BatchNorm2d, activation: Tensor, delta: Tensor) -> None:
    """Add of BatchNorm with running statistics."""
    shape = (-1,) + (1,) * (activation.ndim - 2)
    scale = torch.rsqrt(cast(Tensor, layer.running_var) + layer.eps).view(shape)
    mean = cast(Tensor, layer.running_mean).view(shape)
    _add_norm(sums, lambda a: (a - mean) * scale, activation, delta, range(2, delta.ndim))


def add_group_norm(sums: Sums, layer: nn.GroupNorm, activation: Tensor, delta: Tensor) -> None:
    """Add of GroupNorm."""
    groups, eps = layer.num_groups, layer.eps
    _add_norm(sums, lambda a: group_norm(a, groups, eps=eps), activation, delta, range(2, delta.ndim))


def add_layer_norm(sums: Sums, layer: nn.LayerNorm, activation: Tensor, delta: Tensor) -> None:
    """Add of LayerNorm."""
    shape, eps = list(layer.normalized_shape), layer.eps
    positions = range(1, delta.ndim - len(shape))
    _add_norm(sums, lambda a: layer_norm(a, shape, eps=eps), activation, delta, positions)


def _add_norm(sums: Sums, normalise: Callable, activation: Tensor, delta: Tensor, positions: range) -> None:
    """Add (sum over positions p of delta_i,p x_i,p)^2, x being what the layer scales."""
    examples, dims = max(1, TILE_ELEMENTS // 4 // activation[0].numel()), tuple(positions)

    def total(values: Tensor) -> Tensor:
        return values.sum(dims) if dims else values

    for a, d in zip(activation.split(examples), delta.split(examples), strict=True):
        a, d = at_least_fp32(a), at_least_fp32(d)
        sums["weight"].add_(total(normalise(a) * d).square().sum(0))
        if "bias" in sums:
            sums["bias"].add_(total(d).square().sum(0))


def add_embedding(sums: Sums, layer: nn.Embedding, activation: Tensor, delta: Tensor) -> None:
    """Add of an embedding: a row's gradient is the sum of those of the positions where it was looked up."""
    rows, d = activation.flatten(1) if activation.ndim > 1 else activation[:, None], at_least_fp32(delta)
    for places, d_i in zip(rows, d.flatten(1, -2) if d.ndim > 2 else d[:, None], strict=True):
        gradient = torch.zeros_like(sums["weight"]).index_add_(0, places, d_i)
        if layer.padding_idx is not None:
            gradient[layer.padding_idx] = 0
        sums["weight"].addcmul_(gradient, gradient)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: add_linear,
    **dict.fromkeys(_CONVOLUTIONS, add_convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), add_batch_norm),
    nn.GroupNorm: add_group_norm,
    nn.LayerNorm: add_layer_norm,
    nn.Embedding: add_embedding,
}
