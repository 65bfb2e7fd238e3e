"""Pooled training as the study does it, beside a bare loop: `python -m benchmarks.pooled --width 64`.

On a GPU the study replays CUDA graphs of whole steps; `--compile` adds a row of the compiled model.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.timing import be_a_worker, in_turns, ratio, spread, table
from fedunlearn.build import on_device
from fedunlearn.data.batches import scale
from fedunlearn.data.decoded import Split
from fedunlearn.data.partition import iid_partition
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Outputs, TwoHeadModel, TwoHeadResNet18
from fedunlearn.nn.precision import autocast, precision_on
from fedunlearn.study.pooled.pool import NOBODY, Examples, Pool
from fedunlearn.study.pooled.roofline import matrix_rate, training_operations
from fedunlearn.study.pooled.training import Recipe, Training


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser("python -m benchmarks.pooled", description=__doc__)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--images", type=int, default=1300, help="no multiple of the batch: the last one is smaller")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--compile", action="store_true")
    options = p.parse_args()
    be_a_worker()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool = random_pool(options.images, device)
    work = {
        "a bare loop: no augmentation, no counts, same loss": bare_epoch(pool, options.width, options.batch),
        "the study's epoch": study_epoch(pool, options.width, options.batch, compiled=False),
    }
    if options.compile:
        work["the study's epoch, compiled"] = study_epoch(pool, options.width, options.batch, compiled=True)
    seconds = in_turns(work, options.repeats)
    model = TwoHeadResNet18(10, 10, width=options.width).to(device)
    operations = training_operations(model, scale(pool.train.images[:1])[0]) * options.images
    first, rows = next(iter(seconds.values())), []
    for name, own in seconds.items():
        speed = [options.images / s for s in own]
        fraction = operations / min(own) / matrix_rate(device, "auto")
        rows.append([name, *spread(speed, digits=0), ratio(own, first), f"{fraction:.1%}"])
    peak = f"{precision_on(device, 'auto')}, {matrix_rate(device, 'auto') / 1e12:.2f} TFLOP/s"
    title = f"training, width {options.width}, batch {options.batch}, {peak}"
    table(title, ["", "images/s", "min", "max", "time / bare", "of the matrix rate"], rows)


def random_pool(count: int, device: torch.device) -> Pool:
    """Make noise, dealt out to ten clients."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 10)
    owner = np.full(count, NOBODY)
    for client, owned in enumerate(iid_partition(split.labels, 10)):
        owner[owned] = client
    examples = Examples.of(split, owner, device)
    return Pool(examples, examples, 10)


def study_epoch(pool: Pool, width: int, batch: int, *, compiled: bool) -> Callable[[], None]:
    """Give one epoch of `study.pooled.training`."""
    weights = {"class_weight": 1.0, "client_weight": 1.0, "disentangle_weight": 0.1}
    recipe = Recipe(
        epochs=10**6,
        batch_size=batch,
        lr=0.01,
        schedule="constant",
        momentum=0.9,
        weight_decay=5e-4,
        crop_padding=4,
        flip=True,
        precision="auto",
        warmup=0.0,
        loss=weights,
    )
    model = new_model(pool, width)
    return Training(model, pool.train, pool.train.all(), recipe, 0, compiled=compiled).run_epoch


def bare_epoch(pool: Pool, width: int, batch: int) -> Callable[[], None]:
    """Give the least that trains the same model on the same images."""
    model, device = new_model(pool, width).train(), pool.train.images.device
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def epoch() -> None:
        for images, labels, clients in pool.train.batches(pool.train.all(), batch):
            with autocast(device, "auto"):
                outputs: Outputs = model(images)
            optimiser.zero_grad(set_to_none=True)
            multi_task_loss(*outputs, labels, clients).backward()
            optimiser.step()

    return epoch


def new_model(pool: Pool, width: int) -> TwoHeadModel:
    """Make a model with random weights, where the images are."""
    return on_device(TwoHeadResNet18(10, 10, width=width), pool.train.images.device)


if __name__ == "__main__":
    main()
