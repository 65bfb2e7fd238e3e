"""Estimate BatchNorm's running statistics again after unlearning (paper, Algorithm 1, line 5)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedunlearn.nn.hooks import layer_inputs, train_batch_norms
from fedunlearn.nn.precision import at_least_fp32, autocast


def no_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Make the statistics of no images: zeros, in the shapes of `batch_statistics`, on the CPU.

    Args:
        model: whose BatchNorm layers they are of.

    Returns:
        `{layer: [3, channels]}` in fp64.

    Example:
        >>> no_statistics(nn.Sequential(nn.BatchNorm2d(5)))["0"].shape
        torch.Size([3, 5])
    """
    return {
        name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in _batch_norms(model).items()
    }


@torch.no_grad()
def batch_statistics(model: nn.Module, batches: Iterable[Tensor], *, precision: str = "fp32") -> dict[str, Tensor]:
    """Sum count, values and squares of every BatchNorm layer's input, channel by channel.

    The layers normalise with the statistics of their own batch meanwhile, as in training. One pass therefore serves
    all depths. All other layers work as in evaluation: nothing drops out. The running statistics stay as they are.
    Statistics of different clients add up to those of all of them.

    Args:
        model: is as before at the end.
        batches: of images [N, ...], N >= 2, on the model's device.
        precision: of the forward passes (`nn.precision`).

    Returns:
        `{layer: [3, channels]}` in fp64, with rows count, sum, sum of squares; empty for a model without BatchNorm.

    Example:
        >>> images = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
        >>> batch_statistics(nn.Sequential(nn.BatchNorm2d(1)), [images])["0"][:, 0].tolist()
        [2.0, 4.0, 10.0]
    """
    layers = _batch_norms(model)
    statistics = {name: total.to(_running(layers[name])[0].device) for name, total in no_statistics(model).items()}

    def add(name: str, _layer: nn.Module, activation: Tensor) -> None:
        dims = (0, *range(2, activation.ndim))
        found = torch.var_mean(at_least_fp32(activation.detach()), dim=dims, correction=0)
        variance, mean = (value.double() for value in found)
        count = activation.numel() // activation.shape[1]
        statistics[name] += count * torch.stack([torch.ones_like(mean), mean, variance + mean.square()])

    kept = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(_BUFFERS)}
    with layer_inputs(model, (_BatchNorm,), add):
        train_batch_norms(model)
        try:
            for images in batches:
                with autocast(images.device, precision):
                    model(images)
        finally:
            model.load_state_dict(kept, strict=False)
    return statistics


@torch.no_grad()
def recalibrate(model: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Set every BatchNorm layer's running mean and (unbiased) variance from statistics, in place.

    Running statistics have seen the forget set D_f too, and do not fit dampened weights. They are estimated again on
    the retain set D_r.

    Args:
        model: whose running statistics are set.
        statistics: of `batch_statistics`, summed over clients.

    Raises:
        ValueError: statistics of other layers than the model's, or of fewer than two values a channel.

    Example:
        >>> layers = nn.Sequential(nn.BatchNorm2d(1))
        >>> recalibrate(layers, {"0": torch.tensor([[2.0], [4.0], [10.0]])})
        >>> layers[0].running_mean, layers[0].running_var
        (tensor([2.]), tensor([2.]))
    """
    layers = _batch_norms(model)
    if statistics.keys() != layers.keys():
        raise ValueError(f"statistics of {sorted(statistics)[:3]}, but the BatchNorm layers are {sorted(layers)[:3]}")
    for name, layer in layers.items():
        count, total, squares = statistics[name]
        if not (count > 1).all():
            raise ValueError(f"statistics of {name} have fewer than two values a channel")
        mean = total / count
        running_mean, running_var = _running(layer)
        running_mean.copy_(mean)
        running_var.copy_((squares / count - mean.square()).clamp(min=0) * count / (count - 1))


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    if layer.running_mean is None or layer.running_var is None:
        raise ValueError(f"{layer} has no running statistics")
    return layer.running_mean, layer.running_var
