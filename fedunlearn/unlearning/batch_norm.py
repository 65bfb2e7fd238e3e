"""One unlearning step, and the re-estimation of what BatchNorm remembers (paper, Algorithm 1, lines 4 and 5)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedunlearn.nn.precision import autocast


def no_moments(model: nn.Module) -> dict[str, Tensor]:
    """The moments of no images: zeros, in the shapes of `batch_moments`."""
    return {
        name: torch.zeros(3, layer.num_features, dtype=torch.float64) for name, layer in _batch_norms(model).items()
    }


@torch.no_grad()
def batch_moments(model: nn.Module, batches: Iterable[Tensor], *, precision: str = "fp32") -> dict[str, Tensor]:
    """Count, sum and sum of squares of every BatchNorm layer's input, a channel.

    The layers normalise with their batch's own statistics meanwhile, as in training, so that one pass serves all
    depths; the running statistics do not move. Moments of different clients add up to the moments of all of them.

    Args:
        batches: of images [N, ...], N >= 2, on the model's device.
        precision: of the forward passes (`fedunlearn.precision`).

    Returns:
        `{layer: [3, channels]}` in fp64, rows count, sum, sum of squares; empty for a model without BatchNorm.
    """
    layers = _batch_norms(model)
    moments = {name: total.to(layers[name].running_mean.device) for name, total in no_moments(model).items()}

    def add(name: str, activation: Tensor) -> None:
        a = activation.detach().double().transpose(0, 1).flatten(1)
        count = torch.full_like(a[:, 0], a.shape[1])
        moments[name] += torch.stack([count, a.sum(1), a.square().sum(1)])

    hooks = [
        layer.register_forward_pre_hook(lambda _layer, inputs, name=name: add(name, inputs[0]))
        for name, layer in layers.items()
    ]
    was_training = model.training
    kept = {name: value.clone() for name, value in model.state_dict().items() if name.endswith(_STATISTICS)}
    model.train()
    try:
        for images in batches:
            with autocast(images.device, precision):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.load_state_dict(kept, strict=False)
        model.train(was_training)
    return moments


@torch.no_grad()
def recalibrate(model: nn.Module, moments: dict[str, Tensor]) -> None:
    """Set every BatchNorm layer's running mean and (unbiased) variance to those of `moments`, in place.

    Running statistics have seen D_f too, and no longer fit dampened weights: they are estimated again on D_r.

    Args:
        moments: of `batch_moments`, summed over clients.

    Raises:
        ValueError: moments of other layers than the model's, or of fewer than two values a channel.
    """
    layers = _batch_norms(model)
    if moments.keys() != layers.keys():
        raise ValueError(f"moments of {sorted(moments)[:3]}, but the BatchNorm layers are {sorted(layers)[:3]}")
    for name, layer in layers.items():
        count, total, squares = moments[name]
        if not (count > 1).all():
            raise ValueError(f"moments of {name} have fewer than two values a channel")
        mean = total / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / count - mean.square()).clamp(min=0) * count / (count - 1))


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
