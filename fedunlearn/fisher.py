"""The diagonal empirical Fisher of one head's cross-entropy: how much each weight matters to a set of examples."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, group_norm, unfold

from fedunlearn.model import Batch

HEADS = ("class", "client")
ESTIMATORS = ("per_example", "batch")

CHUNK_ELEMENTS = 2**23  # per-example gradients held at once by one layer


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], *, head: str = "class", estimator: str = "per_example"
) -> dict[str, Tensor]:
    """F_i = mean over examples of (d loss / d theta_i)^2, in eval mode, independent of the batch size.

    `estimator="per_example"` is that exactly. `"batch"` is what the published code of SSD does: the squared gradient
    of the batch-mean loss, averaged over batches; it shrinks as batches grow. `head="class"` takes the class head's
    cross-entropy (paper, Section 4.4), `"client"` the client head's (paper, Algorithm 1, line 4). Parameters that the
    loss does not reach have a Fisher of zero.

    Args:
        model: gives `(class_logits, client_logits, embedding)`. For `per_example` its parameters must belong to
            Conv2d, Linear, BatchNorm2d or GroupNorm modules that run once a forward pass.
        batches: of `(images [N, ...], class_labels [N], client_ids [N])`, on the model's device.

    Returns:
        One tensor a parameter, of its name and shape, fp32.

    Raises:
        ValueError: no examples, an unknown head or estimator, or no client head for `head="client"`.
        TypeError: `per_example` met a module that it does not know, or one that ran twice.
    """
    if head not in HEADS or estimator not in ESTIMATORS:
        raise ValueError(f"head={head!r} is not one of {HEADS}, or estimator={estimator!r} not one of {ESTIMATORS}")
    add_squares = _add_per_example_squares if estimator == "per_example" else _add_batch_square
    sums = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in model.named_parameters()}
    count = 0
    with _eval_mode(model):
        for batch in batches:
            count += add_squares(sums, model, batch, head)
    if count == 0:
        raise ValueError("the Fisher of no examples is not defined")
    return {name: total / count for name, total in sums.items()}


def _head_loss(model: nn.Module, batch: Batch, head: str, reduction: str) -> Tensor:
    images, class_labels, client_ids = batch
    class_logits, client_logits, _ = model(images)
    if head == "class":
        return cross_entropy(class_logits, class_labels, reduction=reduction)
    if client_logits is None:
        raise ValueError('head="client" needs a model with a client head')
    return cross_entropy(client_logits, client_ids, reduction=reduction)


def _add_batch_square(sums: dict[str, Tensor], model: nn.Module, batch: Batch, head: str) -> int:
    loss = _head_loss(model, batch, head, reduction="mean")
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for total, gradient in zip(sums.values(), gradients, strict=True):
        if gradient is not None:
            total += gradient.square()
    return 1


def _add_per_example_squares(sums: dict[str, Tensor], model: nn.Module, batch: Batch, head: str) -> int:
    with _capture_layers(sums, model):
        # the gradient of a sum of losses reaches each example's activations as that example's own gradient
        _head_loss(model, batch, head, reduction="sum").backward(inputs=list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = None
    return len(batch[0])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _capture_layers(sums: dict[str, Tensor], model: nn.Module) -> Iterator[None]:
    """While open, a backward pass adds every layer's squared per-example gradients to `sums`."""
    seen: set[nn.Module] = set()

    def forward_hook(name: str, layer: nn.Module, squares: Callable) -> Callable:
        def on_forward(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if layer in seen:
                raise TypeError(f"{name} ran twice in one forward pass: shared weights have no per-example layer sum")
            seen.add(layer)
            activation = inputs[0].detach()
            output.register_hook(lambda delta: add(name, squares(layer, activation, delta)))

        return on_forward

    def add(name: str, squared: dict[str, Tensor]) -> None:
        for parameter, values in squared.items():
            sums[f"{name}.{parameter}" if name else parameter] += values

    hooks = []
    for name, layer in model.named_modules():
        if not list(layer.parameters(recurse=False)):
            continue
        squares = _SQUARES.get(type(layer))
        if squares is None or getattr(layer, "groups", 1) != 1:
            raise TypeError(f"no per-example Fisher for {name} ({type(layer).__name__}): use estimator='batch'")
        hooks.append(layer.register_forward_hook(forward_hook(name, layer, squares)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear_squares(layer: nn.Linear, activation: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """(delta_i a_i^T)^2 summed over examples is delta^2 summed against a^2: one matrix product."""
    squared = delta.square()
    result = {"weight": squared.T @ activation.square()}
    return result if layer.bias is None else result | {"bias": squared.sum(0)}


def _conv_squares(layer: nn.Conv2d, activation: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """Sum over examples i of (sum over positions p of delta_i,p a_i,p^T)^2, in chunks of examples."""
    delta = delta.flatten(2)
    total = torch.zeros(layer.weight.numel() // layer.out_channels, layer.out_channels, device=delta.device)
    chunk = max(1, CHUNK_ELEMENTS // layer.weight.numel())
    for a, d in zip(activation.split(chunk), delta.split(chunk), strict=True):
        patches = unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        total += torch.bmm(patches, d.transpose(1, 2)).square().sum(0)
    result = {"weight": total.T.reshape(layer.weight.shape)}
    return result if layer.bias is None else result | {"bias": delta.sum(2).square().sum(0)}


def _norm_squares(layer: nn.Module, normalised: Tensor, delta: Tensor) -> dict[str, Tensor]:
    return {
        "weight": (delta * normalised).sum((2, 3)).square().sum(0),
        "bias": delta.sum((2, 3)).square().sum(0),
    }


def _batch_norm_squares(layer: nn.BatchNorm2d, activation: Tensor, delta: Tensor) -> dict[str, Tensor]:
    scale = torch.rsqrt(layer.running_var + layer.eps)
    normalised = (activation - layer.running_mean[:, None, None]) * scale[:, None, None]
    return _norm_squares(layer, normalised, delta)


def _group_norm_squares(layer: nn.GroupNorm, activation: Tensor, delta: Tensor) -> dict[str, Tensor]:
    return _norm_squares(layer, group_norm(activation, layer.num_groups, eps=layer.eps), delta)


_SQUARES: dict[type[nn.Module], Callable] = {
    nn.Linear: _linear_squares,
    nn.Conv2d: _conv_squares,
    nn.BatchNorm2d: _batch_norm_squares,
    nn.GroupNorm: _group_norm_squares,
}
