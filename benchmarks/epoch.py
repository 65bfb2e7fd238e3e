"""A local epoch and an evaluation beside the same arithmetic in a bare loop: `python -m benchmarks.epoch`.

The bare loop has its batches as tensors on the device, and neither shuffles nor augments nor counts.
"""

import argparse
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks import timing
from fedunlearn.build import on_device
from fedunlearn.data.batches import batches
from fedunlearn.data.decoded import Split
from fedunlearn.nn.evaluate import evaluate, predict
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch, Outputs, TwoHeadModel, TwoHeadResNet18
from fedunlearn.nn.precision import PASSES, autocast
from fedunlearn.nn.rng import generator_of
from fedunlearn.nn.sgd import LocalSGD

LR, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


def main() -> None:
    """Print one table; ratios are to the bare loop above, turn by turn."""
    p = argparse.ArgumentParser("python -m benchmarks.epoch", description=__doc__)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--images", type=int, default=384)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--precision", choices=PASSES, default="auto")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--as-worker", action="store_true", help="with the memory settings of the federation's workers")
    options = p.parse_args()
    if options.as_worker:
        timing.be_a_worker()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = np.random.default_rng(0)
    images = random.integers(256, size=(options.images, 32, 32, 3), dtype=np.uint8)
    split = Split(images, random.integers(10, size=options.images))
    model = on_device(TwoHeadResNet18(10, 10, width=options.width), device)
    owned = partial(batches, split, np.arange(options.images), 3, batch_size=options.batch, device=device)
    seconds = timing.in_turns(work(model, owned, options.precision, options.batch), options.repeats)
    rows, unit = [], ""
    for name, times in seconds.items():
        unit = name if "bare" in name else unit
        rows.append([name, *timing.spread(times, 1000 / options.images), timing.ratio(times, seconds[unit])])
    columns = ("work", "ms an image: median", "min", "max", "ratio to bare")
    title = f"width {options.width}, {options.images} images, batch {options.batch}, {options.precision}"
    timing.table(f"{title}, {options.repeats} turns", columns, rows)


def work(model: TwoHeadModel, owned: partial, precision: str, batch: int) -> timing.Work:
    """Give an epoch bare and ours, two of mixed clients without and with disentanglement, evaluations bare and ours."""
    alone = list(owned())
    mixed = [(images, labels, torch.arange(len(labels), device=labels.device) % 10) for images, labels, _ in alone]
    optimiser = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    bare = partial(bare_epoch, model, optimiser, precision=precision)
    local = LocalSGD(model, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, precision=precision, batch_size=batch)

    def ours() -> None:
        shuffled = owned(generator=generator_of(0), crop_padding=4, flip=True)
        local.fit([shuffled], lr=LR, loss={})

    return {
        "bare epoch": partial(bare, alone),
        "our epoch": ours,
        "bare epoch, ten clients, no disentanglement": partial(bare, mixed, disentangle_weight=0.0),
        "with disentanglement": partial(bare, mixed),
        "bare evaluation": partial(bare_evaluation, model, alone, precision),
        "our evaluation": lambda: evaluate(model, owned(), precision=precision),
        "our predictions, with counts and features": lambda: predictions(model, owned(), precision),
    }


def bare_epoch(
    model: nn.Module,
    optimiser: torch.optim.SGD,
    epoch: list[Batch],
    *,
    precision: str,
    disentangle_weight: float = 0.1,
) -> None:
    """Go forward and backward, and make a step, for each batch."""
    model.train()
    for images, labels, clients in epoch:
        with autocast(images.device, precision):
            outputs: Outputs = model(images)
        optimiser.zero_grad()
        multi_task_loss(*outputs, labels, clients, disentangle_weight=disentangle_weight).backward()
        optimiser.step()


def predictions(model: nn.Module, epoch: Iterable[Batch], precision: str) -> None:
    """Collect every client's counts and what membership inference looks at, from one pass."""
    found = predict(model, epoch, precision=precision)
    found.counts()
    found.features()


@torch.no_grad()
def bare_evaluation(model: nn.Module, epoch: list[Batch], precision: str) -> None:
    """Go forward for each batch."""
    model.eval()
    for images, _, _ in epoch:
        with autocast(images.device, precision):
            model(images)


if __name__ == "__main__":
    main()
