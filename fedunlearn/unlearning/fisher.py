"""Compute the diagonal empirical Fisher of one head's loss: how much each weight matters to a set of examples."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, group_norm

from fedunlearn.nn.hooks import kept_modes
from fedunlearn.nn.model import Batch, TwoHeadResNet18
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.unlearning import fisher_triton

LOSS_HEADS = ("class", "client")
ESTIMATORS = ("per_example", "batch")

TILE_ELEMENTS = 2**20
"""Elements of an example's weight gradient that are computed at once: they should stay in a core's cache."""


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    loss_head: str = "class",
    estimator: str = "per_example",
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Average the squared gradients of each example's loss over examples, in eval mode.

    F_i = mean over examples of (d loss / d theta_i)^2. `estimator="per_example"` is exactly that, whatever the batch
    size. `"batch"` is what the published code of SSD does: it averages the squared gradient of the batch-mean loss over
    batches, which shrinks as batches grow. `loss_head="class"` takes the class head's cross-entropy (paper, Section
    4.4), `"client"` the client head's (paper, Algorithm 1, line 4). Parameters that the loss does not reach have a
    Fisher of zero.

    Args:
        model: gives `(class_logits, client_logits, embedding)`, and is as before at the end. For `per_example` its
            parameters must belong to Conv2d, Linear, BatchNorm2d or GroupNorm modules that run once a forward pass.
        batches: of `(images [N, ...], class_labels [N], client_ids [N])`, on the model's device.
        loss_head: one of `LOSS_HEADS`.
        estimator: one of `ESTIMATORS`.
        precision: of the forward and backward passes, `fp32` or `bf16`; the products of each layer's activations and
            gradients, their squares and the sums are fp32 in both.

    Returns:
        One tensor a parameter, of its name and shape, fp32.

    Raises:
        ValueError: no examples, an unknown head or estimator, or no client head for `loss_head="client"`.
        TypeError: `per_example` met a module that it does not know (convolutions with groups, with padding by words or
            by anything but zeros among them), or one that ran twice.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(2, 3, width=8)
        >>> batch = torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 0])
        >>> fisher = diagonal_fisher(model, [batch])
        >>> fisher["class_head.out.bias"].min() > 0, fisher["client_head.out.bias"]
        (tensor(True), tensor([0., 0., 0.]))
    """
    if loss_head not in LOSS_HEADS or estimator not in ESTIMATORS:
        raise ValueError(
            f"loss_head={loss_head!r} is not one of {LOSS_HEADS}, or estimator={estimator!r} not one of {ESTIMATORS}"
        )
    add_squares = _add_per_example_squares if estimator == "per_example" else _add_batch_square
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    count = 0
    with kept_modes(model):
        model.eval()
        for batch in batches:
            count += add_squares(sums, model, batch, loss_head, precision)
    if count == 0:
        raise ValueError("the Fisher of no examples is not defined")
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def with_drawn_labels(
    model: TwoHeadResNet18, batches: Iterable[Batch], generator: torch.Generator, *, precision: str = "fp32"
) -> list[Batch]:
    """Draw the classes of images from what the model predicts, in place of their labels.

    The mean over such examples of the squared gradient is the Fisher, that over labelled examples the empirical one
    (Kunstner et al., 2019, "Limitations of the empirical Fisher approximation for natural gradient descent").

    Args:
        model: predicts in eval mode, and is as before at the end.
        batches: of `(images [N, ...], class_labels [N], client_ids [N])`, on the model's device.
        generator: of the draws, on the CPU.
        precision: of the forward passes (`nn.precision`).

    Returns:
        The same batches with other class labels.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> batch = torch.ones(4, 3, 8, 8), torch.tensor([7, 7, 7, 7]), torch.tensor([0, 1, 2, 0])
        >>> ((_, labels, _),) = with_drawn_labels(TwoHeadResNet18(2, 3, width=8), [batch], torch.Generator())
        >>> labels.max() < 2
        tensor(True)
    """
    drawn = []
    with kept_modes(model):
        model.eval()
        for images, _, client_ids in batches:
            with autocast(images.device, precision):
                probs = at_least_fp32(model(images).class_logits).softmax(1)
            labels = torch.multinomial(probs.cpu(), 1, generator=generator)[:, 0].to(images.device)
            drawn.append((images, labels, client_ids))
    return drawn


def head_loss(model: nn.Module, batch: Batch, loss_head: str, precision: str, reduction: str) -> Tensor:
    """Compute one head's cross-entropy on a batch, `reduction` as torch names it."""
    images, class_labels, client_ids = batch
    with autocast(images.device, precision):
        class_logits, client_logits, _ = model(images)
    if loss_head == "client" and client_logits is None:
        raise ValueError('loss_head="client" needs a model with a client head')
    logits, labels = (class_logits, class_labels) if loss_head == "class" else (client_logits, client_ids)
    return cross_entropy(at_least_fp32(logits), labels, reduction=reduction)


def _add_batch_square(sums: dict[str, Tensor], model: nn.Module, batch: Batch, loss_head: str, precision: str) -> int:
    loss = head_loss(model, batch, loss_head, precision, reduction="mean")
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for total, gradient in zip(sums.values(), gradients, strict=True):
        if gradient is not None:
            total += gradient.square()
    return 1


def _add_per_example_squares(
    sums: dict[str, Tensor], model: nn.Module, batch: Batch, loss_head: str, precision: str
) -> int:
    images, class_labels, client_ids = batch
    images = images.detach().requires_grad_()
    with no_weight_gradients(model), _capture_layers(sums, model):
        # the gradient of a sum of losses reaches each example's activations as that example's own gradient
        loss = head_loss(model, (images, class_labels, client_ids), loss_head, precision, reduction="sum")
        torch.autograd.grad(loss, images)
    return len(images)


@contextmanager
def no_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Spare a backward pass the sums over examples where nothing needs them: a third of its work."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _capture_layers(sums: dict[str, Tensor], model: nn.Module) -> Iterator[None]:
    """Let a backward pass add every layer's squared per-example gradients to `sums`.

    These rules need the gradients of outputs too, which the hooks of `nn.hooks.layer_inputs` do not see.
    """
    seen: set[nn.Module] = set()

    def forward_hook(name: str, layer: nn.Module, add_squares: Callable) -> Callable:
        own = {parameter: sums[f"{name}.{parameter}"] for parameter, _ in layer.named_parameters(recurse=False)}

        def on_forward(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if layer in seen:
                raise TypeError(f"{name} ran twice in one forward pass: shared weights have no per-example layer sum")
            seen.add(layer)
            activation = inputs[0].detach()
            output.register_hook(lambda delta: add_squares(own, layer, activation, delta))

        return on_forward

    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in sums:
            raise TypeError(f"{name} is shared with another module: shared weights have no per-example layer sum")
    hooks = []
    for name, layer in model.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        add_squares = _ADD_SQUARES.get(type(layer))
        if add_squares is None or (isinstance(layer, nn.Conv2d) and not _is_plain(layer)):
            kind = str(layer).splitlines()[0]
            raise TypeError(f"no per-example Fisher for {name or 'the model'} ({kind}): use estimator='batch'")
        hooks.append(layer.register_forward_hook(forward_hook(name, layer, add_squares)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _add_linear_squares(sums: dict[str, Tensor], layer: nn.Linear, activation: Tensor, delta: Tensor) -> None:
    """Sum (delta_i a_i^T)^2 over examples i by one matrix product, of delta^2 and a^2."""
    squared = at_least_fp32(delta).square()
    sums["weight"].addmm_(squared.T, at_least_fp32(activation).square())
    if layer.bias is not None:
        sums["bias"] += squared.sum(0)


def _add_conv_squares(sums: dict[str, Tensor], layer: nn.Conv2d, activation: Tensor, delta: Tensor) -> None:
    """Sum (sum over positions p of delta_i,p a_i,p^T)^2 over examples i."""
    if fisher_triton.available(delta.device) and delta.dtype in (torch.float32, torch.bfloat16):
        sums["weight"] += fisher_triton.conv_squares(
            activation.to(delta.dtype),
            delta,
            kernel_size=_pair(layer.kernel_size),
            stride=_pair(layer.stride),
            padding=_pair(layer.padding),
            dilation=_pair(layer.dilation),
            input_precision="tf32" if torch.backends.cudnn.allow_tf32 else "ieee",
        )
    else:
        _add_conv_squares_in_tiles(sums["weight"], layer, at_least_fp32(activation), at_least_fp32(delta))
    if layer.bias is not None:
        sums["bias"] += at_least_fp32(delta).sum((2, 3)).square().sum(0)


def _pair(geometry: str | tuple[int, ...]) -> tuple[int, int]:
    """Narrow the type of a two-dimensional convolution's geometry, of which `_is_plain` excludes words."""
    return cast("tuple[int, int]", geometry)


def _add_conv_squares_in_tiles(sums: Tensor, layer: nn.Conv2d, activation: Tensor, delta: Tensor) -> None:
    """Compute one gradient for each example and tile of output channels, and square it while it is in the cache."""
    tiles = 2 ** max(0, math.ceil(math.log2(layer.weight.numel() / TILE_ELEMENTS)))
    rows = math.ceil(layer.out_channels / tiles)
    for total, weight, d in zip(sums.split(rows), layer.weight.split(rows), delta.split(rows, dim=1), strict=True):
        for a_i, d_i in zip(activation.split(1), d.split(1), strict=True):
            gradient = _weight_gradient(layer, weight, a_i, d_i)
            total.addcmul_(gradient, gradient)


def _weight_gradient(layer: nn.Conv2d, weight: Tensor, activation: Tensor, delta: Tensor) -> Tensor:
    """Compute `torch.nn.grad.conv2d_weight` of the output channels that `delta` has, in the weight's memory order."""
    geometry = (layer.stride, layer.padding, layer.dilation, False, (0, 0), 1)
    return torch.ops.aten.convolution_backward(delta, activation, weight, None, *geometry, (False, True, False))[1]


def _add_batch_norm_squares(sums: dict[str, Tensor], layer: nn.BatchNorm2d, activation: Tensor, delta: Tensor) -> None:
    if layer.running_mean is None or layer.running_var is None:
        raise TypeError(f"no per-example Fisher for {layer}: it has no running statistics")
    scale = torch.rsqrt(layer.running_var + layer.eps)[:, None, None]
    mean = layer.running_mean[:, None, None]
    _add_norm_squares(sums, lambda a: (a - mean) * scale, activation, delta)


def _add_group_norm_squares(sums: dict[str, Tensor], layer: nn.GroupNorm, activation: Tensor, delta: Tensor) -> None:
    _add_norm_squares(sums, lambda a: group_norm(a, layer.num_groups, eps=layer.eps), activation, delta)


def _add_norm_squares(sums: dict[str, Tensor], normalise: Callable, activation: Tensor, delta: Tensor) -> None:
    """Sum (sum over positions p of delta_i,p x_i,p)^2 over examples i, x being what the layer scales."""
    examples = max(1, TILE_ELEMENTS // 4 // activation[0].numel())
    for a, d in zip(activation.split(examples), delta.split(examples), strict=True):
        a, d = at_least_fp32(a), at_least_fp32(d)
        sums["weight"] += (normalise(a) * d).sum((2, 3)).square().sum(0)
        sums["bias"] += d.sum((2, 3)).square().sum(0)


_ADD_SQUARES: dict[type[nn.Module], Callable] = {
    nn.Linear: _add_linear_squares,
    nn.Conv2d: _add_conv_squares,
    nn.BatchNorm2d: _add_batch_norm_squares,
    nn.GroupNorm: _add_group_norm_squares,
}
