"""How the benchmarks measure and print: everything in one run, turn by turn, medians with their spread."""

import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedunlearn import malloc

Work = Mapping[str, Callable[[], object]]


def in_turns(work: Work, repeats: int) -> dict[str, list[float]]:
    """Time each call: once without counting, then `repeats` times in turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, function in work.items():
            _wait_for_gpu()
            started = time.perf_counter()
            function()
            _wait_for_gpu()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(seconds: Sequence[float], scale: float = 1, digits: int = 2) -> list[str]:
    """Give median, minimum and maximum, each times `scale`, as words for a table."""
    return [f"{f(seconds) * scale:,.{digits}f}" for f in (statistics.median, min, max)]


def ratio(seconds: Sequence[float], unit: Sequence[float]) -> str:
    """Give the median of the ratios turn by turn."""
    return f"{statistics.median(a / b for a, b in zip(seconds, unit, strict=True)):.2f}"


def peak_mebibytes(function: Callable, *arguments: object) -> float:
    """Measure by how much some work raises the peak of resident memory (on a GPU: of allocated memory).

    The work is done in a process of its own. What importing and preparing it has taken does not count.

    Args:
        function: prepares the work, and returns a callable that does it.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (function, arguments))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, width: int = 130) -> None:
    """Print rows under the machine's name; all columns but the first are numbers."""
    view = Table(title=f"{title}\n{machine()}", title_justify="left")
    for i, column in enumerate(columns):
        view.add_column(column, justify="right" if i else "left")
    for row in rows:
        view.add_row(*map(str, row))
    Console(width=width).print(view)


def be_a_worker() -> None:
    """Start this process anew with `malloc.ENVIRONMENT`, unless it has it."""
    if not malloc.ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | malloc.ENVIRONMENT)


def machine() -> str:
    """Name what was measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def mean_spread(values: Sequence[float]) -> str:
    """Give mean ± standard deviation, where there are two or more."""
    text = f"{statistics.mean(values):.3f}"
    return f"{text} ± {statistics.stdev(values):.3f}" if len(values) > 1 else text


def _peak(function: Callable, arguments: tuple) -> float:
    work = function(*arguments)
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's began before exec
    before = _resident_peak()
    work()
    return _resident_peak() - before


def _resident_peak() -> float:
    (line,) = (line for line in _lines("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
