"""Restrict changes of a model to directions that the inputs of its layers hardly have.

The outputs for these inputs then hardly change (Zeng et al., 2019, "Continual learning of context-dependent processing
in neural networks"). There the inputs are those of tasks that were learned before; here they are those of the retain
clients' images.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from fedunlearn.nn.hooks import layer_inputs
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.precision import autocast

MOST_POSITIONS = 8
"""Positions of a kernel that are looked at, a side of the image: neighbours look alike."""

_KINDS = (nn.Conv2d, nn.Linear)


def zero_covariances(model: TwoHeadResNet18) -> dict[str, Tensor]:
    """Make the covariances of no images: zeros, in the shapes of `input_covariances`, on the CPU.

    Args:
        model: whose layers they are of.

    Returns:
        `{layer: [d, d]}` in fp32.

    Example:
        >>> zero_covariances(TwoHeadResNet18(num_classes=2, num_clients=3, width=8))["class_head.out"].shape
        torch.Size([17, 17])
    """
    sizes = {name: layer.weight[0].numel() + (layer.bias is not None) for name, layer in _layers(model).items()}
    return {name: torch.zeros(size, size) for name, size in sizes.items()}


@torch.no_grad()
def input_covariances(
    model: TwoHeadResNet18, batches: Iterable[Tensor], *, precision: str = "fp32"
) -> dict[str, Tensor]:
    """Average x x^T over images and positions, for every layer with weights W x but the client head's.

    The covariance A = mean of x x^T is uncentred. x is a linear layer's input, or what a convolution's kernel sees at
    one position. At most every eighth of an image's side is looked at. A layer with a bias has a 1 at the end of x. The
    model runs in eval mode: BatchNorm normalises with its running statistics.

    Args:
        model: is as before at the end.
        batches: of images [N, ...], on the model's device.
        precision: of the forward passes (`nn.precision`); covariances are fp32 all the same.

    Returns:
        `{layer: [d, d]}` in fp32; they do not depend on how images are batched.

    Example:
        >>> model = TwoHeadResNet18(num_classes=2, num_clients=3, width=8)
        >>> found = input_covariances(model, [torch.zeros(4, 3, 8, 8)])
        >>> found["class_head.out"][-1, -1]  # the 1 of the bias
        tensor(1.)
    """
    covariances = {name: total.to(model.pruned.device) for name, total in zero_covariances(model).items()}
    images = 0

    def add(name: str, layer: nn.Module, activation: Tensor) -> None:
        if name not in covariances:
            return
        with autocast(activation.device, "fp32"):
            x = _inputs(layer, activation.float())
            covariances[name] += torch.einsum("npd,npe->de", x, x) / x.shape[1]

    with layer_inputs(model, _KINDS, add):
        model.eval()
        for batch in batches:
            with autocast(batch.device, precision):
                model(batch)
            images += len(batch)
    return {name: total / images for name, total in covariances.items()}


def projectors(covariances: Mapping[str, Tensor], *, ridge: float) -> dict[str, Tensor]:
    """Compute P = tau (A + tau I)^-1 for every layer, with tau = ridge * mean of A's diagonal.

    P is the identity along directions that the inputs do not have, and tau / (tau + lambda) along a direction of mean
    square lambda. A change dW P of a layer's weights changes its outputs by dW P x, which is little for inputs like
    those of A (Zeng et al., 2019).

    Args:
        covariances: A of `input_covariances`, or a mean of several.
        ridge: above 0; smaller ones protect the inputs more, and from about 1 on P protects nothing.

    Returns:
        `{layer: [d, d]}`.

    Raises:
        ValueError: A + tau I of a layer has an eigenvalue below zero, which no mean of x x^T has.

    Example:
        >>> projectors({"layer": torch.diag(torch.tensor([6.0, 0.0, 0.0]))}, ridge=1.0)["layer"].diagonal()
        tensor([0.2500, 1.0000, 1.0000])
    """
    return {name: _projector(name, a, ridge * float(a.diagonal().mean())) for name, a in covariances.items()}


def _projector(name: str, a: Tensor, tau: float) -> Tensor:
    tau = max(tau, torch.finfo(a.dtype).tiny)
    root, failed = torch.linalg.cholesky_ex(a + tau * torch.eye(len(a), device=a.device))
    if failed:
        raise ValueError(f"the input covariance of {name} is no mean of x x^T to within the ridge: raise the ridge")
    return tau * torch.cholesky_inverse(root)


def upper(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the diagonal of symmetric matrices and what is right of it, row by row: all that has to be sent.

    Args:
        matrices: [d, d] by name.

    Returns:
        [d (d + 1) / 2] by name.

    Example:
        >>> upper({"a": torch.tensor([[1, 2], [2, 3]])})
        {'a': tensor([1, 2, 3])}
    """
    return {name: a[_upper(len(a), a.device)] for name, a in matrices.items()}


def symmetric(triangles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore the symmetric matrices that `upper` took the triangles of.

    Args:
        triangles: [d (d + 1) / 2] by name.

    Returns:
        [d, d] by name.

    Example:
        >>> symmetric({"a": torch.tensor([1, 2, 3])})["a"]
        tensor([[1, 2],
                [2, 3]])
    """
    return {name: _symmetric(values) for name, values in triangles.items()}


def _symmetric(values: Tensor) -> Tensor:
    size = (math.isqrt(8 * len(values) + 1) - 1) // 2
    a = values.new_zeros(size, size)
    a[_upper(size, a.device)] = values
    return a + a.triu(1).T


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu()


@torch.no_grad()
def project_gradients(model: TwoHeadResNet18, projectors: Mapping[str, Tensor]) -> None:
    """Multiply the gradients of layers by their projectors, and drop all other gradients, in place.

    G <- G P, with the bias as the last column of G.

    Args:
        model: after a backward pass that reached these layers.
        projectors: P by layer, of `projectors`.

    Raises:
        ValueError: a layer has no gradient.
    """
    layers = _layers(model)
    gradients = {name: _gradients(name, layers[name]) for name in projectors}
    model.zero_grad()
    for name, p in projectors.items():
        layer, (gradient, bias) = layers[name], gradients[name]
        rows = gradient.flatten(1)
        if bias is not None:
            rows = torch.cat([rows, bias[:, None]], 1)
        rows = rows @ p
        layer.weight.grad = gradient.copy_(rows[:, : gradient[0].numel()].reshape(gradient.shape))
        if layer.bias is not None:
            layer.bias.grad = rows[:, -1].contiguous()


def _gradients(name: str, layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias = None if layer.bias is None else layer.bias.grad
    if layer.weight.grad is None or (layer.bias is not None and bias is None):
        raise ValueError(f"{name} has no gradient")
    return layer.weight.grad, bias


def _inputs(layer: nn.Module, activation: Tensor) -> Tensor:
    """Give what the layer's weights are multiplied with, [N, positions, d]."""
    if isinstance(layer, nn.Conv2d):
        if isinstance(layer.padding, str):
            raise TypeError(f"no input covariance for {layer}: its padding is a word")
        step = max(1, activation.shape[2] // layer.stride[0] // MOST_POSITIONS)
        stride = (layer.stride[0] * step, layer.stride[1] * step)
        x = unfold(activation, layer.kernel_size, padding=layer.padding, stride=stride).transpose(1, 2)
    else:
        x = activation[:, None]
    return x if layer.bias is None else pad(x, (0, 1), value=1.0)


def _layers(model: TwoHeadResNet18) -> dict[str, nn.Conv2d | nn.Linear]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _KINDS) and not name.startswith("client_head.")
    }
