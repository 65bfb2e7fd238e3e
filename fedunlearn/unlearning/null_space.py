"""Changes of a model that others hardly notice: along directions that the inputs of its layers hardly have."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.precision import autocast

MOST_POSITIONS = 8  # a side, of an image: neighbours look alike


def no_products(model: TwoHeadResNet18) -> dict[str, Tensor]:
    """The products of no images: zeros, in the shapes of `input_products`."""
    sizes = {name: layer.weight[0].numel() + (layer.bias is not None) for name, layer in _layers(model).items()}
    return {name: torch.zeros(size, size) for name, size in sizes.items()}


@torch.no_grad()
def input_products(model: TwoHeadResNet18, batches: Iterable[Tensor], *, precision: str = "fp32") -> dict[str, Tensor]:
    """A = mean of x x^T of every layer that works on weights W x, the client head's apart.

    x is a linear layer's input, or what a convolution's kernel sees at one place (at most every eighth of an image's
    side is looked at), with a 1 behind it where the layer has a bias. The model is asked as it answers: BatchNorm
    normalises with its running statistics.

    Args:
        batches: of images [N, ...], on the model's device.
        precision: of the forward passes (`fedunlearn.precision`); products are fp32 all the same.

    Returns:
        `{layer: [d, d]}` in fp32, the mean over images and places; it does not depend on how they are batched.
    """
    layers, products, images = _layers(model), no_products(model), 0
    products = {name: total.to(model.pruned.device) for name, total in products.items()}

    def add(layer: nn.Module, name: str, activation: Tensor) -> None:
        with autocast(activation.device, "fp32"):
            x = _inputs(layer, activation.float())
            products[name] += torch.einsum("npd,npe->de", x, x) / x.shape[1]

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: add(layer, name, inputs[0]))
        for name, layer in layers.items()
    ]
    model.eval()
    try:
        for batch in batches:
            with autocast(batch.device, precision):
                model(batch)
            images += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / images for name, total in products.items()}


def projectors(products: dict[str, Tensor], *, ridge: float) -> dict[str, Tensor]:
    """P = tau (A + tau I)^-1, tau = ridge * mean of A's diagonal: the identity where the inputs have nothing, and
    tau / lambda along a direction of mean square lambda.

    A change dW P of a layer's weights moves its outputs by dW P x, little for inputs like those of A (Zeng et al.,
    2019, "Continual learning of context-dependent processing in neural networks", for what is already learned;
    here it is the retained clients' images).

    Args:
        products: A of `input_products`, or a mean of several.
        ridge: above 0; from about 1 on P spares nothing.

    Raises:
        ValueError: A + tau I of a layer has an eigenvalue below zero, which no mean of x x^T has.
    """
    return {name: _projector(name, a, ridge * float(a.diagonal().mean())) for name, a in products.items()}


def _projector(name: str, a: Tensor, tau: float) -> Tensor:
    tau = max(tau, torch.finfo(a.dtype).tiny)
    root, failed = torch.linalg.cholesky_ex(a + tau * torch.eye(len(a), device=a.device))
    if failed:
        raise ValueError(f"the products of {name}'s inputs are no mean of x x^T to within unlearn.ridge: raise it")
    return tau * torch.cholesky_inverse(root)


def upper(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of symmetric matrices [d, d] has to be sent: the diagonal and what is right of it, row by row."""
    return {name: a[_upper(len(a), a.device)] for name, a in matrices.items()}


def symmetric(triangles: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of `upper`."""
    return {name: _symmetric(values) for name, values in triangles.items()}


def _symmetric(values: Tensor) -> Tensor:
    size = (math.isqrt(8 * len(values) + 1) - 1) // 2
    a = values.new_zeros(size, size)
    a[_upper(size, a.device)] = values
    return a + a.triu(1).T


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu()


@torch.no_grad()
def project_gradients(model: TwoHeadResNet18, by: dict[str, Tensor]) -> None:
    """G <- G P for every layer in `by` (with its bias), in place; all other gradients are dropped."""
    layers = _layers(model)
    gradients = {name: layers[name].weight.grad for name in by}
    biases = {name: layers[name].bias.grad for name in by if layers[name].bias is not None}
    model.zero_grad()
    for name, p in by.items():
        layer, gradient = layers[name], gradients[name]
        rows = gradient.flatten(1)
        if name in biases:
            rows = torch.cat([rows, biases[name][:, None]], 1)
        rows = rows @ p
        layer.weight.grad = gradient.copy_(rows[:, : gradient[0].numel()].reshape(gradient.shape))
        if name in biases:
            layer.bias.grad = rows[:, -1].contiguous()


def _inputs(layer: nn.Module, activation: Tensor) -> Tensor:
    """What the layer's weights are multiplied with, [N, places, d]."""
    if isinstance(layer, nn.Conv2d):
        apart = max(1, activation.shape[2] // layer.stride[0] // MOST_POSITIONS)
        stride = (layer.stride[0] * apart, layer.stride[1] * apart)
        x = unfold(activation, layer.kernel_size, padding=layer.padding, stride=stride).transpose(1, 2)
    else:
        x = activation[:, None]
    return x if layer.bias is None else pad(x, (0, 1), value=1.0)


def _layers(model: TwoHeadResNet18) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not name.startswith("client_head.")
    }
