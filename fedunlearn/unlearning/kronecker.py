"""Kronecker factors of the Fisher of a model's layers, and gradients that are guided by them.

The Fisher of a layer with weights W is approximated by F = A (x) G. A is the mean of x x^T over the layer's inputs x. G
is the mean of d d^T over the loss's gradients d by its outputs (Martens and Grosse, 2015, "Optimizing neural networks
with Kronecker-factored approximate curvature", Section 3.1). A step along (F + damping)^-1 changes the predictions on
images like those of F little. With A alone it is a step in the null space of their inputs (Zeng et al., 2019,
"Continual learning of context-dependent processing in neural networks").

Everything here is a dict of tensors whose names are a layer's name and one of `INPUTS`, `OUTPUTS`, `DIAGONAL`. Layers
are those with one matrix of weights: linear ones and convolutions of one group, in one or two dimensions. The guide has
no other parameters, and those that it does not have stay as they are: a step without it would change any prediction.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from fedunlearn.nn.hooks import layer_inputs, layer_output_gradients
from fedunlearn.nn.model import Batch, TwoHeadModel
from fedunlearn.nn.precision import autocast
from fedunlearn.unlearning.fisher import head_loss, no_weight_gradients
from fedunlearn.unlearning.fisher_rules import padded, rule_of

INPUTS, OUTPUTS, DIAGONAL = ".inputs", ".outputs", ".diagonal"
"""How names end: of what belongs to a layer's inputs, to its outputs, to each of its weights."""

MOST_POSITIONS = 8
"""Positions of a kernel that are looked at, a side of the image: neighbours look alike."""

Layer = nn.Conv1d | nn.Conv2d | nn.Linear
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


def zero_input_covariances(model: TwoHeadModel) -> dict[str, Tensor]:
    """Make the input covariances of no images: zeros, in the shapes of `input_covariances`, on the CPU.

    Args:
        model: whose layers they are of.

    Returns:
        `{layer.inputs: [d, d]}` in fp32.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(num_classes=2, num_clients=3, width=8)
        >>> zero_input_covariances(model)["class_head.out.inputs"].shape
        torch.Size([17, 17])
    """
    sizes = {name: layer.weight[0].numel() + (layer.bias is not None) for name, layer in _layers(model).items()}
    return {name + INPUTS: torch.zeros(size, size) for name, size in sizes.items()}


def zero_factors(model: TwoHeadModel) -> dict[str, Tensor]:
    """Make the factors of no images: zeros, in the shapes of `kronecker_factors`, on the CPU.

    Args:
        model: whose layers they are of.

    Returns:
        `{layer.inputs: [d, d], layer.outputs: [out, out]}` in fp32.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> zero_factors(TwoHeadResNet18(num_classes=2, num_clients=3, width=8))["class_head.out.outputs"].shape
        torch.Size([2, 2])
    """
    outputs = {name: len(layer.weight) for name, layer in _layers(model).items()}
    return zero_input_covariances(model) | {name + OUTPUTS: torch.zeros(size, size) for name, size in outputs.items()}


@torch.no_grad()
def input_covariances(model: TwoHeadModel, batches: Iterable[Tensor], *, precision: str = "fp32") -> dict[str, Tensor]:
    """Average x x^T over images and positions, for every layer with weights W x but the client head's.

    The covariance A = mean of x x^T is uncentred. x is a linear layer's input, or what a convolution's kernel sees at
    one position. At most every eighth of an image's side is looked at. A layer with a bias has a 1 at the end of x. The
    model runs in eval mode: BatchNorm normalises with its running statistics. Layers that do not run are left out.

    Args:
        model: is as before at the end.
        batches: of images [N, ...], on the model's device.
        precision: of the forward passes (`nn.precision`); covariances are fp32 all the same.

    Returns:
        `{layer.inputs: [d, d]}` in fp32; they do not depend on how images are batched.

    Raises:
        ValueError: no images.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(num_classes=2, num_clients=3, width=8)
        >>> found = input_covariances(model, [torch.zeros(4, 3, 8, 8)])
        >>> found["class_head.out.inputs"][-1, -1]  # the 1 of the bias
        tensor(1.)
    """
    sums, images, seen = _on_device(zero_input_covariances(model), model), 0, set[str]()
    with layer_inputs(model, _KINDS, lambda *given: _add_inputs(sums, seen, *given)):
        model.eval()
        for batch in batches:
            with autocast(batch.device, precision):
                model(batch)
            images += len(batch)
    return _mean({name: total for name, total in sums.items() if name in seen}, images)


def kronecker_factors(model: TwoHeadModel, batches: Iterable[Batch], *, precision: str = "fp32") -> dict[str, Tensor]:
    """Average x x^T over inputs, and d d^T over gradients by outputs, for every layer but the client head's.

    A = mean of x x^T as in `input_covariances`. G = mean of d d^T, over images and positions, with d = d loss / d (W x)
    and the class head's cross-entropy of one image as the loss. F = A (x) G approximates the layer's Fisher but for a
    factor (Martens and Grosse, 2015, Section 3.1; for convolutions Grosse and Martens, 2016, "A Kronecker-factored
    approximate Fisher matrix for convolution layers"). The model runs in eval mode.

    Args:
        model: is as before at the end.
        batches: of `(images [N, ...], class_labels [N], client_ids [N])`, on the model's device.
        precision: of the passes (`nn.precision`); factors are fp32 all the same.

    Returns:
        `{layer.inputs: [d, d], layer.outputs: [out, out]}` in fp32; they do not depend on how images are batched.

    Raises:
        ValueError: no images.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(num_classes=2, num_clients=3, width=8)
        >>> batch = torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 0])
        >>> found = kronecker_factors(model, [batch])
        >>> torch.linalg.matrix_rank(found["class_head.out.outputs"])  # gradients of two classes sum to zero
        tensor(1)
    """
    sums, examples, seen = _on_device(zero_factors(model), model), 0, set[str]()

    def add_outputs(name: str, layer: nn.Module, delta: Tensor) -> None:
        if (name := name + OUTPUTS) in sums and delta.ndim > 1:
            with autocast(delta.device, "fp32"):
                d = delta.float()
                d = _rows_of(d).transpose(1, 2) if isinstance(layer, nn.Linear) else d.flatten(2)
                sums[name] += torch.einsum("nip,njp->ij", d, d) / d.shape[2]
                seen.add(name)

    with (
        layer_inputs(model, _KINDS, lambda *given: _add_inputs(sums, seen, *given)),
        layer_output_gradients(model, _KINDS, add_outputs),
        no_weight_gradients(model),
    ):
        model.eval()
        for images, class_labels, client_ids in batches:
            images = images.detach().requires_grad_()
            # the gradient of a sum of losses reaches each example's outputs as that example's own gradient
            loss = head_loss(model, (images, class_labels, client_ids), "class", precision, reduction="sum")
            if loss.requires_grad:
                torch.autograd.grad(loss, images, allow_unused=True)
            examples += len(images)
    whole = {name for name in _layers(model) if {name + INPUTS, name + OUTPUTS} <= seen}
    return _mean({name: total for name, total in sums.items() if name.removesuffix(_kind(name)) in whole}, examples)


@torch.no_grad()
def _add_inputs(sums: dict[str, Tensor], seen: set[str], name: str, layer: Layer, activation: Tensor) -> None:
    least = 2 if isinstance(layer, nn.Linear) else 2 + len(layer.kernel_size)
    if (name := name + INPUTS) in sums and activation.ndim >= least:
        with autocast(activation.device, "fp32"):
            x = _inputs(layer, activation.float())
            sums[name] += torch.einsum("npd,npe->de", x, x) / x.shape[1]
            seen.add(name)


def _mean(sums: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
    if not images:
        raise ValueError("the covariance of no images is not defined")
    return {name: total / images for name, total in sums.items()}


def _on_device(zeros: Mapping[str, Tensor], model: TwoHeadModel) -> dict[str, Tensor]:
    return {name: total.to(model.pruned.device) for name, total in zeros.items()}


def projectors(factors: Mapping[str, Tensor], *, ridge: float, output_ridge: float | None = None) -> dict[str, Tensor]:
    """Compute P = tau (A + tau I)^-1 of every factor, with tau = ridge * mean of A's diagonal.

    P is the identity along directions that inputs (or gradients by outputs) do not have, and tau / (tau + lambda) along
    a direction of mean square lambda. With projectors of both factors, P_G D P_A is a gradient D of a layer's weights
    times the inverse of (G + tau_G I) (x) (A + tau_A I), but for a factor: a step of natural gradient with factored
    damping (Martens and Grosse, 2015, Section 6.3). With the projector of A alone a change D P of the weights changes
    outputs by D P x, which is little for inputs like those of A (Zeng et al., 2019).

    Args:
        factors: A and G of `kronecker_factors`, or means of several.
        ridge: of A, above 0; smaller ones protect the inputs more, and from about 1 on P protects nothing.
        output_ridge: of G; as `ridge` by default.

    Returns:
        Matrices of the same names and shapes.

    Raises:
        ValueError: A + tau I of a layer has an eigenvalue below zero, which no mean of x x^T has.

    Example:
        >>> a = torch.diag(torch.tensor([6.0, 0.0, 0.0]))
        >>> projectors({"layer.inputs": a}, ridge=1.0)["layer.inputs"].diagonal()
        tensor([0.2500, 1.0000, 1.0000])
    """
    by_kind = {INPUTS: ridge, OUTPUTS: ridge if output_ridge is None else output_ridge}
    return {name: _projector(name, a, by_kind[_kind(name)] * float(a.diagonal().mean())) for name, a in factors.items()}


def _projector(name: str, a: Tensor, tau: float) -> Tensor:
    tau = max(tau, torch.finfo(a.dtype).tiny)
    root, failed = torch.linalg.cholesky_ex(a + tau * torch.eye(len(a), device=a.device))
    if failed:
        raise ValueError(f"the covariance {name} is no mean of x x^T to within the ridge: raise the ridge")
    return tau * torch.cholesky_inverse(root)


def diagonal_guide(model: TwoHeadModel, fisher: Mapping[str, Tensor], *, ridge: float) -> dict[str, Tensor]:
    """Compute tau / (F_i + tau) of every weight, with tau = ridge * mean of F over its layer.

    It is `projectors` with the Fisher's diagonal in place of its Kronecker factors.

    Args:
        model: whose layers the Fisher is of.
        fisher: F, by parameter (`fisher.diagonal_fisher`).
        ridge: above 0.

    Returns:
        `{layer.diagonal: [out, d]}`, with the bias, if there is one, as the last column.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> model = TwoHeadResNet18(num_classes=2, num_clients=3, width=8)
        >>> fisher = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> diagonal_guide(model, fisher, ridge=1.0)["class_head.out.diagonal"].unique()
        tensor([0.5000])
    """
    found = {}
    for name, layer in _layers(model).items():
        bias = None if layer.bias is None else fisher[f"{name}.bias"]
        rows = _rows(fisher[f"{name}.weight"], bias)
        tau = max(ridge * float(rows.mean()), torch.finfo(rows.dtype).tiny)
        found[name + DIAGONAL] = tau / (rows + tau)
    return found


def upper(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the diagonal of symmetric matrices and what is right of it, row by row: all that has to be sent.

    Args:
        matrices: [d, d] by name. Those named `DIAGONAL` are not symmetric, and stay as they are.

    Returns:
        [d (d + 1) / 2] by name.

    Example:
        >>> upper({"a.inputs": torch.tensor([[1, 2], [2, 3]])})
        {'a.inputs': tensor([1, 2, 3])}
    """
    return {n: a if n.endswith(DIAGONAL) else a[_upper(len(a), a.device)] for n, a in matrices.items()}


def symmetric(triangles: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Restore the symmetric matrices that `upper` took the triangles of.

    Args:
        triangles: [d (d + 1) / 2] by name.

    Returns:
        [d, d] by name.

    Example:
        >>> symmetric({"a.inputs": torch.tensor([1, 2, 3])})["a.inputs"]
        tensor([[1, 2],
                [2, 3]])
    """
    return {name: a if name.endswith(DIAGONAL) else _symmetric(a) for name, a in triangles.items()}


def _symmetric(values: Tensor) -> Tensor:
    size = (math.isqrt(8 * len(values) + 1) - 1) // 2
    a = values.new_zeros(size, size)
    a[_upper(size, a.device)] = values
    return a + a.triu(1).T


def _upper(size: int, device: torch.device) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).triu()


@torch.no_grad()
def guide_gradients(model: TwoHeadModel, guide: Mapping[str, Tensor]) -> None:
    """Multiply the gradients of layers by what is to guide them, and drop all other gradients, in place.

    D <- P_G D P_A, and D <- D * f elementwise, as far as the guide has them; the bias is the last column of D. A layer
    that the loss does not reach has no gradient afterwards either.

    Args:
        model: after a backward pass that reached these layers.
        guide: `projectors`, or `diagonal_guide`. Layers that it does not name get no gradient.
    """
    layers = _layers(model)
    guided = {name.removesuffix(_kind(name)) for name in guide}
    gradients = {
        name: _rows(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
        for name, layer in layers.items()
        if name in guided and layer.weight.grad is not None
    }
    model.zero_grad()
    for name, rows in gradients.items():
        if (p := guide.get(name + INPUTS)) is not None:
            rows = rows @ p
        if (p := guide.get(name + OUTPUTS)) is not None:
            rows = p @ rows
        if (factor := guide.get(name + DIAGONAL)) is not None:
            rows = rows * factor
        layer = layers[name]
        size = layer.weight[0].numel()
        layer.weight.grad = torch.empty_like(layer.weight).copy_(rows[:, :size].reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.grad = rows[:, -1].contiguous()


def _rows(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Give a layer's weights as a matrix, [out, d], with the bias as its last column."""
    rows = weight.flatten(1)
    return rows if bias is None else torch.cat([rows, bias[:, None]], 1)


def _kind(name: str) -> str:
    return name[name.rindex(".") :]


def _inputs(layer: Layer, activation: Tensor) -> Tensor:
    """Give what the layer's weights are multiplied with, [N, positions, d]."""
    if isinstance(layer, nn.Linear):
        x = _rows_of(activation)
    else:
        step = max(1, activation.shape[2] // layer.stride[0] // MOST_POSITIONS)
        activation, padding = padded(layer, activation)
        flat = 2 - len(padding)  # one dimension is two, the first of them of one position
        x = unfold(
            activation.unsqueeze(2) if flat else activation,
            (1,) * flat + layer.kernel_size,
            dilation=(1,) * flat + layer.dilation,
            padding=(0,) * flat + padding,
            stride=(1,) * flat + tuple(step * stride for stride in layer.stride),
        ).transpose(1, 2)
    return x if layer.bias is None else pad(x, (0, 1), value=1.0)


def _rows_of(values: Tensor) -> Tensor:
    """Give values [N, ..., d] of a linear layer as [N, positions, d]."""
    return values.reshape(len(values), -1, values.shape[-1])


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Give the layers that are guided: all but the client head's whose weights are theirs alone, and are trained."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, _KINDS)
        and rule_of(layer)
        and getattr(layer, "groups", 1) == 1
        and not name.startswith("client_head.")
        and all(p.requires_grad and owners[id(p)] == 1 for p in layer.parameters(recurse=False))
    }


def unguided(model: nn.Module, guide: Mapping[str, Tensor]) -> list[str]:
    """Name the matrices of weights that a guide does not have, but for the client head's.

    Args:
        model: whose layers the guide is of.
        guide: of `projectors` or `diagonal_guide`.

    Example:
        >>> unguided(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"0.inputs": torch.eye(3)})
        ['1.weight']
    """
    guided = {name.removesuffix(_kind(name)) for name in guide}
    return [
        name
        for name, p in model.named_parameters()
        if p.ndim > 1 and name.rpartition(".")[0] not in guided and not name.startswith("client_head.")
    ]
