"""What dishonest clients do to a model, by how updates are averaged.

A federation of digits (600 images, width 8, four clients on four nodes) trains 60 rounds honestly. Then one of the
clients lies in each of eight further rounds. Every lie and every rule goes on from the same 60 rounds.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from benchmarks import timing
from benchmarks.reliability.lying import Lie, LyingGrid
from fedunlearn.apps.server_app import server_app
from fedunlearn.apps.simulate import app_folder
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.run import Run

RULES = ("none", "clip", "median", "trimmed_mean")
LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "honest": lambda value: value,
    "silent": lambda value: value * torch.nan,
    "sign flipped": lambda value: -value,
    "x 10": lambda value: 10 * value,
    "x -3": lambda value: -3 * value,
    "noise": lambda value: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * value.std() * 10,
}
SMALL = "data.limit=600 clients=4 model.width=8 rounds={rounds} seed={seed} train.schedule_rounds=68 evaluate_every=68"


def measure(home: Path, seeds: int) -> None:
    """Print one table: test accuracy by lie and rule, means over seeds."""
    rows = []
    for seed in range(seeds):
        trained(home, f"base-{seed}", SMALL.format(rounds=60, seed=seed), LyingGrid(None))
    for name, lie in LIES.items():
        cells = []
        for rule in RULES:
            runs = [(f"{name}-{rule}-{seed}".replace(" ", "_"), seed) for seed in range(seeds)]
            words = f"fork=base-{{seed}} rounds=68 robust={rule}"
            found = [
                trained(home, run, words.format(seed=seed), LyingGrid(Lie("train", 1, name, lie))) for run, seed in runs
            ]
            cells.append(f"{mean(found):.3f} ({min(found):.3f}-{max(found):.3f})")
        rows.append([name, *cells])
        print(*rows[-1], flush=True)
    timing.table(f"test accuracy, mean of {seeds} seeds (range), by `robust`", ("client 1", *RULES), rows)


def trained(home: Path, run: str, words: str, grid: LocalGrid) -> float:
    """Train a run to its end, and give its test accuracy."""
    overrides = f"{words} run={run} home={home} train.precision=fp32 message_dtype=fp32"
    context = Context(1, 1, {}, RecordDict(), {"overrides": overrides})
    server_app(app_folder("digits") / "conf")(grid, context)
    opened = Run.opened(runs_folder(home) / run)
    try:
        return float(opened.metrics()[-1]["test"]["class"])
    finally:
        opened.ledger.close()
