"""Compute the diagonal empirical Fisher of one head's loss: how much each weight matters to a set of examples."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from fedunlearn.nn.hooks import kept_modes
from fedunlearn.nn.model import Batch, Outputs, TwoHeadModel
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.unlearning.fisher_rules import Rule, is_example_wise, rule_of

LOSS_HEADS = ("class", "client")
ESTIMATORS = ("per_example", "batch")

ONE_BY_ONE_ELEMENTS = 2**24
"""Elements of gradients of single examples that are in memory at once, of parameters without a closed rule."""

log = getLogger("fedunlearn")


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
        model: gives `(class_logits, client_logits, embedding)`, and is as before at the end. `per_example` has closed
            rules for convolutions, Linear, Embedding, BatchNorm, GroupNorm and LayerNorm modules that run once a
            forward pass. Any other parameter costs one more backward pass an example, and the log says so. Parameters
            that need no gradient have a Fisher of zero.
        batches: of `(images [N, ...], class_labels [N], client_ids [N])`, on the model's device.
        loss_head: one of `LOSS_HEADS`.
        estimator: one of `ESTIMATORS`.
        precision: of the forward and backward passes, `fp32` or `bf16`; the products of each layer's activations and
            gradients, their squares and the sums are fp32 in both.

    Returns:
        One tensor a parameter, of its name and shape, fp32.

    Raises:
        ValueError: no examples, an unknown head or estimator, or no client head for `loss_head="client"`.

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
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    add = (_PerExample if estimator == "per_example" else _PerBatch)(model, sums, loss_head, precision).add
    count = 0
    with kept_modes(model):
        model.eval()
        for batch in batches:
            count += add(batch)
    if count == 0:
        raise ValueError("the Fisher of no examples is not defined")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            sums[name].zero_()
    return {name: total / count for name, total in sums.items()}


def cost_in_words(model: nn.Module, batch: Batch, *, loss_head: str = "class") -> list[str]:
    """Say beforehand what takes `diagonal_fisher` (per example) longer than closed rules do.

    Args:
        model: as for `diagonal_fisher`.
        batch: whose first example shows how the model runs.
        loss_head: one of `LOSS_HEADS`.

    Returns:
        A line about the parameters that take one backward pass an example, perhaps one more; none where all have rules.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> batch = torch.ones(1, 3, 8, 8), torch.tensor([0]), torch.tensor([0])
        >>> cost_in_words(TwoHeadResNet18(2, 3, width=8), batch)
        []
    """
    images, class_labels, client_ids = (part[:1] for part in batch)
    with kept_modes(model):
        model.eval()
        return _PerExample(model, {}, loss_head, "fp32").cost((images, class_labels, client_ids))


@torch.no_grad()
def with_drawn_labels(
    model: TwoHeadModel, batches: Iterable[Batch], generator: torch.Generator, *, precision: str = "fp32"
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


class _PerBatch:
    """Adds up squares of the gradients of whole batches' mean losses."""

    def __init__(self, model: nn.Module, sums: dict[str, Tensor], loss_head: str, precision: str) -> None:
        self.model, self.loss_head, self.precision = model, loss_head, precision
        self.trained = [(p, sums[name]) for name, p in model.named_parameters() if p.requires_grad]

    def add(self, batch: Batch) -> int:
        """Add a batch's square; returns that it counts as one."""
        loss = head_loss(self.model, batch, self.loss_head, self.precision, reduction="mean")
        gradients = torch.autograd.grad(loss, [p for p, _ in self.trained], allow_unused=True)
        for (_, total), gradient in zip(self.trained, gradients, strict=True):
            if gradient is not None:
                total += gradient.square()
        return 1


class _PerExample:
    """Adds up squares of single examples' gradients: by a layer's closed rule, or by passes over one example each.

    The first example that comes shows which layers run once, on one entry an example, with parameters that nothing else
    uses. These have their rule, if there is one. All other parameters get passes of their own.
    """

    def __init__(self, model: nn.Module, sums: dict[str, Tensor], loss_head: str, precision: str) -> None:
        self.model, self.sums, self.loss_head, self.precision = model, sums, loss_head, precision
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.places = _places(model)
        self.rules: dict[str, Rule] | None = None
        self.idle: set[str] = set()  # layers that do not run
        self.in_batches = True  # whether passes over single examples can be made many at once

    def add(self, batch: Batch) -> int:
        """Add a batch's squares; returns how many examples it has."""
        if self.rules is None:
            images, class_labels, client_ids = batch
            self.rules, self.idle = self._known((images[:1], class_labels[:1], client_ids[:1]))
        done = self._add_by_rules(batch)
        if rest := [name for name in self.trained if name not in done]:
            said_once(_cost_in_words(rest, self.trained))
            self._add_one_by_one(batch, rest)
        return len(batch[0])

    def cost(self, example: Batch) -> list[str]:
        """Say which parameters take passes of their own, and whether these are made one by one."""
        rules, _ = self._known(example)
        known = {id(p) for name in rules for p in self.model.get_submodule(name).parameters(recurse=False)}
        rest = [name for name, p in self.trained.items() if id(p) not in known]
        if not rest:
            return []
        lines = [_cost_in_words(rest, self.trained)]
        try:
            self._gradients_at_once(example, rest)
        except Exception as error:
            lines.append(_why_one_by_one(error))
        return lines

    def _known(self, example: Batch) -> tuple[dict[str, Rule], set[str]]:
        """Choose the layers that have a rule, and say which of them do not run."""
        layers = {name: (layer, rule) for name, layer in self.model.named_modules() if (rule := rule_of(layer))}
        if any(isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in self.model.modules()):
            return {}, set()  # examples of a batch would change each other's gradients
        with _runs({name: layer for name, (layer, _) in layers.items()}, 1) as runs:
            uses = _uses(head_loss(self.model, example, self.loss_head, "fp32", "sum"))
        owners = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        rules, idle = {}, set[str]()
        for name, (layer, rule) in layers.items():
            own = [id(p) for p in layer.parameters(recurse=False)]
            is_idle = not runs[name].times and not any(uses[p] for p in own)
            if is_idle or (runs[name].is_plain and all(uses[p] <= 1 and owners[p] == 1 for p in own)):
                rules[name] = rule
            if is_idle:
                idle.add(name)
        return rules, idle

    def _add_by_rules(self, batch: Batch) -> set[str]:
        """Add by closed rules in one backward pass; returns the names of parameters that have been added."""
        images, class_labels, client_ids = batch
        images, rules = images.detach().requires_grad_(), self.rules or {}
        layers = {name: self.model.get_submodule(name) for name in rules}
        own = {n: {p: f"{n}.{p}" for p, _ in layer.named_parameters(recurse=False)} for n, layer in layers.items()}

        def add(name: str, activation: Tensor, delta: Tensor) -> None:
            if runs[name].is_plain:
                rules[name]({p: self.sums[of] for p, of in own[name].items()}, layers[name], activation, delta)

        with no_weight_gradients(self.model):
            with _runs(layers, len(images), add) as runs:
                # the gradient of a sum of losses reaches each example's activations as that example's own gradient
                loss = head_loss(
                    self.model, (images, class_labels, client_ids), self.loss_head, self.precision, reduction="sum"
                )
            if loss.requires_grad:
                begun = [run.output for run in runs.values() if run.output is not None]
                torch.autograd.grad(loss, [images, *begun], allow_unused=True)
        done = [n for n, run in runs.items() if run.is_plain or (n in self.idle and not run.times)]
        return {of for name in done for of in own[name].values()}

    def _add_one_by_one(self, batch: Batch, names: list[str]) -> None:
        """Add by one backward pass an example, many of them at once where torch can do that with this model."""
        size = max(1, ONE_BY_ONE_ELEMENTS // sum(self.trained[name].numel() for name in names))
        for part in zip(*(of.split(size) for of in batch), strict=True):
            if self.in_batches:
                try:
                    found = self._gradients_at_once(part, names)
                except Exception as error:
                    self.in_batches = False
                    said_once(_why_one_by_one(error))
                else:
                    for name, gradients in found.items():
                        self.sums[name] += at_least_fp32(gradients).square().sum(0)
                    continue
            for one in zip(*(of.split(1) for of in part), strict=True):
                self._add_one(one, names)

    def _gradients_at_once(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        def loss_of(chosen: dict[str, Tensor], *example: Tensor) -> Tensor:
            everywhere = {place: value for name, value in chosen.items() for place in self.places[name]}

            def run(images: Tensor) -> Outputs:
                return functional_call(self.model, everywhere, (images,), tie_weights=False)

            one = tuple(part[None] for part in example)
            return head_loss(run, one, self.loss_head, self.precision, reduction="sum")  # type: ignore[arg-type]

        chosen = {name: self.trained[name].detach() for name in names}
        with no_weight_gradients(self.model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return vmap(grad(loss_of), in_dims=(None, 0, 0, 0))(chosen, *batch)

    def _add_one(self, example: Batch, names: list[str]) -> None:
        loss = head_loss(self.model, example, self.loss_head, self.precision, reduction="sum")
        if not loss.requires_grad:
            return
        gradients = torch.autograd.grad(loss, [self.trained[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                self.sums[name] += at_least_fp32(gradient).square()


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Give the names under which each parameter is found, by the first of them; a module of several names has one.

    `functional_call` with all names of a module would put back what it has put there itself.
    """
    names: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, p in module.named_parameters(module_name, recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
    return {found[0]: found for found in names.values()}


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


@dataclass
class _Run:
    """What a layer did in a forward pass.

    Attributes:
        times: that it ran.
        is_plain: whether it ran once, on one entry an example.
        output: of it, where gradients begin there, since nothing before it has any.
    """

    times: int = 0
    is_plain: bool = False
    output: Tensor | None = None


@contextmanager
def _runs(
    layers: Mapping[str, nn.Module], examples: int, add: Callable[[str, Tensor, Tensor], None] = lambda *_: None
) -> Iterator[dict[str, _Run]]:
    """Watch how layers run in a forward pass; `add` is called later, with a layer's name, its input and the gradient.

    Gradients come when a backward pass reaches an output, after the block. What runs then, as under checkpointing, is
    not watched.
    """
    runs = {name: _Run() for name in layers}

    def hook(name: str) -> Callable:
        def on_forward(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            run = runs[name]
            run.times += 1
            run.is_plain = run.times == 1 and bool(inputs) and is_example_wise(layer, inputs[0], examples)
            if not run.is_plain:
                return None
            if not output.requires_grad:
                run.output = output.detach().requires_grad_()
                output = run.output.clone()  # which what follows may change in place
            activation = inputs[0].detach()
            output.register_hook(lambda delta: add(name, activation, delta))
            return output

        return on_forward

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield runs
    finally:
        for registered in hooks:
            registered.remove()


def _uses(loss: Tensor) -> Counter[int]:
    """Count how often each parameter, by its `id`, went into the operations that a loss was computed by."""
    uses: Counter[int] = Counter()
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for before, _ in node.next_functions:
            if hasattr(before, "variable"):
                uses[id(before.variable)] += 1  # type: ignore[union-attr]
            else:
                waiting.append(before)
    return uses


def _cost_in_words(names: list[str], parameters: Mapping[str, Tensor]) -> str:
    """Say which parameters have no closed rule, how many weights they are, and what that costs."""
    weights, of = (sum(parameters[name].numel() for name in some) for some in (names, parameters))
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    share = f"{weights:,} of {of:,} weights, {weights / of:.0%}"
    return (
        f"Fisher: one backward pass an example for {listed}: no closed rule, or shared ({share}). "
        "So each image takes a pass of its own: on CPUs that took as long as 4 to 6 training steps of the same images, "
        "and 1.5 where all layers have rules"
    )


def _why_one_by_one(error: Exception) -> str:
    return (
        "Fisher: these passes are made one by one, which took as long as 8 to 15 training steps: "
        f"{(str(error) or type(error).__name__).splitlines()[0]}"
    )


@cache
def said_once(line: str) -> None:
    """Log a line, once a process."""
    log.info(line)


def said_anew(line: str) -> None:
    """Log a line, also if it was logged before; afterwards `said_once` passes it over."""
    known = said_once.cache_info().currsize
    said_once(line)
    if said_once.cache_info().currsize == known:
        log.info(line)
