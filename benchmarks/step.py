"""What a training step and a Fisher cost an image: `python -m benchmarks.step --width 16 --batch 32`."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from fedunlearn.evaluate import autocast
from fedunlearn.fisher import ESTIMATORS, diagonal_fisher
from fedunlearn.losses import multi_task_loss
from fedunlearn.model import TwoHeadResNet18


def main() -> None:
    """Print one table; the first row is the unit of the last column."""
    p = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__)
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--device", default="cpu")
    options = p.parse_args()
    device = torch.device(options.device)
    model = TwoHeadResNet18(10, 10, width=options.width).to(device, memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=device) % 10

    def step(precision: str) -> None:
        with autocast(device, precision):
            outputs = model(images)
        model.zero_grad()
        multi_task_loss(*outputs, labels, labels).backward()

    work: dict[str, Callable[[], object]] = {f"training step, {p}": lambda p=p: step(p) for p in ("fp32", "bf16")}
    for estimator in ESTIMATORS:
        work[f"Fisher, {estimator}"] = lambda e=estimator: diagonal_fisher(
            model, [(images, labels, labels)], estimator=e
        )
    threads = (1, 2) if device.type == "cpu" else (torch.get_num_threads(),)
    report(options, {n: {name: timed(f, n, options.repeats, device) for name, f in work.items()} for n in threads})


def timed(function: Callable[[], object], threads: int, repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call, after one that is not counted."""
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def report(options: argparse.Namespace, results: dict[int, dict[str, list[float]]]) -> None:
    """The table: median and spread of milliseconds an image, and the ratio to the first row of the same threads."""
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    title = f"width {options.width}, batch {options.batch}, {machine}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("threads", "work", "ms an image: median", "min", "max", "ratio"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for threads, rows in results.items():
        unit = statistics.median(next(iter(rows.values())))
        for name, seconds in rows.items():
            median, low, high = (f(seconds) for f in (statistics.median, min, max))
            milliseconds = [f"{1000 * value / options.batch:.2f}" for value in (median, low, high)]
            table.add_row(str(threads), name, *milliseconds, f"{median / unit:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
