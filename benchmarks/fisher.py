"""The diagonal Fisher beside a training step and beside its peers: `python -m benchmarks.fisher`.

BackPACK is left out where it is not installed (`uv pip install backpack-for-pytorch`).
"""

import argparse
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import timing
from fedunlearn.build import on_device
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch, Outputs, TwoHeadModel, TwoHeadResNet18
from fedunlearn.nn.precision import PRECISIONS, autocast
from fedunlearn.unlearning.fisher import diagonal_fisher

Fisher = dict[str, Tensor]
Work = Mapping[str, Callable[[TwoHeadModel, Batch], object]]


def main() -> None:
    """Print one table; ratios are to the training step of the same precision."""
    p = argparse.ArgumentParser("python -m benchmarks.fisher", description=__doc__)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--peer-batch", type=int, default=32, help="examples that a peer takes at once (memory)")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-peers", action="store_true")
    p.add_argument("--as-worker", action="store_true", help="with the memory settings of the federation's workers")
    options = p.parse_args()
    if options.as_worker:
        timing.be_a_worker()
    torch.set_num_threads(options.threads)
    functions = {**ours(), **({} if options.no_peers else peers(options.peer_batch))}
    model, batch = problem(options.width, options.batch, options.device)
    seconds = timing.in_turns({name: partial(f, model, batch) for name, f in functions.items()}, options.repeats)
    wanted = {name for name in functions if "Fisher" in name and "bf16" not in name}
    errors = errors_of({name: functions[name] for name in wanted}, model, first(8, batch))
    rows = []
    for name, function in functions.items():
        unit = seconds[f"training step, {'bf16' if 'bf16' in name else 'fp32'}"]
        peak = timing.peak_mebibytes(memory_work, function, options)
        times = timing.spread(seconds[name], 1000 / options.batch)
        rows.append([name, *times, timing.ratio(seconds[name], unit), f"{peak:,.0f}", errors.get(name, "")])
    columns = ("work", "ms an image: median", "min", "max", "ratio to step", "peak MiB", "relative error")
    timing.table(f"width {options.width}, batch {options.batch}, {options.repeats} turns", columns, rows)


def ours() -> Work:
    """Give training steps and our Fisher, in both precisions."""
    steps = {f"training step, {p}": partial(training_step, precision=p) for p in PRECISIONS}
    fishers = {f"Fisher, {p}": partial(our_fisher, precision=p) for p in PRECISIONS}
    return {**steps, **fishers}


def peers(size: int) -> Work:
    """Give other ways to the same numbers."""
    found: dict[str, Callable] = {
        "Fisher, loop over examples": loop,
        "Fisher, torch.func": partial(torch_func, size=size),
    }
    if find_spec("backpack"):
        found["Fisher, BackPACK SumGradSquared"] = partial(backpack, size=size)
    return found


def problem(width: int, batch: int, device: str) -> tuple[TwoHeadModel, Batch]:
    """Make a model with running statistics other than 0 and 1, and random images."""
    torch.manual_seed(0)
    model = on_device(TwoHeadResNet18(10, 10, width=width), torch.device(device))
    images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model(images)
    labels = torch.arange(batch, device=device) % 10
    return model.eval(), (images, labels, labels)


def first(count: int, batch: Batch) -> Batch:
    """Give the first examples of a batch."""
    images, labels, clients = batch
    return images[:count], labels[:count], clients[:count]


def training_step(model: nn.Module, batch: Batch, *, precision: str) -> None:
    """Go forward and backward with the whole objective, in training mode."""
    images, labels, clients = batch
    model.train().zero_grad()
    with autocast(images.device, precision):
        outputs: Outputs = model(images)
    multi_task_loss(*outputs, labels, clients).backward()
    model.eval()


def our_fisher(model: nn.Module, batch: Batch, *, precision: str = "fp32") -> Fisher:
    """Call `unlearning.fisher.diagonal_fisher`."""
    return diagonal_fisher(model, [batch], precision=precision)


def loop(model: nn.Module, batch: Batch) -> Fisher:
    """Make one backward pass an example."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in parameters]
    for image, label in zip(batch[0].split(1), batch[1].split(1), strict=True):
        loss = cross_entropy(model(image)[0], label)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient)
    return {name: total / len(batch[0]) for name, total in zip(names, sums, strict=True)}


def torch_func(model: nn.Module, batch: Batch, *, size: int) -> Fisher:
    """Call `vmap(grad)` on chunks of examples."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(values: Fisher, image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, (values, buffers), (image[None],))[0]
        return cross_entropy(logits, label[None])

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for images, labels in zip(batch[0].split(size), batch[1].split(size), strict=True):
        for name, gradient in per_example(parameters, images, labels).items():
            sums[name] += gradient.square().sum(0)
    return {name: total / len(batch[0]) for name, total in sums.items()}


def backpack(model: TwoHeadModel, batch: Batch, *, size: int) -> Fisher:
    """Use BackPACK's first-order extension, without the client head: it cannot pass by what the loss does not reach."""
    from backpack import backpack as extensions  # type: ignore[import-not-found]
    from backpack import extend  # type: ignore[import-not-found]
    from backpack.extensions import SumGradSquared  # type: ignore[import-not-found]

    images, labels, _ = batch
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    one_head = deepcopy(model)
    one_head.client_head = None
    extended, criterion = extend(one_head), extend(nn.CrossEntropyLoss(reduction="sum"))
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        one_head.zero_grad()
        with extensions(SumGradSquared()), warnings.catch_warnings(action="ignore"):
            criterion(extended(x)[0], y).backward()
        for name, parameter in one_head.named_parameters():
            sums[name] += parameter.sum_grad_squared  # type: ignore[attr-defined]
    return {name: total / len(images) for name, total in sums.items()}


def errors_of(functions: Mapping[str, Callable], model: TwoHeadModel, batch: Batch) -> dict[str, str]:
    """Give ||F - reference|| / ||reference|| over all weights, the reference being the loop in fp64."""
    reference = flat(loop(model.double(), (batch[0].double(), batch[1], batch[2])))
    model.float()
    found = {name: flat(function(model, batch)) for name, function in functions.items()}
    return {name: f"{float((f - reference).norm() / reference.norm()):.1e}" for name, f in found.items()}


def flat(fisher: Fisher) -> Tensor:
    """Give all entries, fp64."""
    return torch.cat([value.double().flatten() for value in fisher.values()])


def memory_work(function: Callable, options: argparse.Namespace) -> Callable[[], object]:
    """Prepare what `timing.peak_mebibytes` runs, with two examples that bring in code and scratch space."""
    torch.set_num_threads(options.threads)
    model, batch = problem(options.width, options.batch, options.device)
    function(model, first(2, batch))
    return partial(function, model, batch)


if __name__ == "__main__":
    main()
