"""What BatchNorm statistics bring and cost, by the images they are estimated from: `python -m benchmarks.batch_norm`.

Every fraction is a federation of its own, with the same seeds. Printed are class accuracies after the last round, and
the work and time of the statistics in percent of training, over all rounds but the first.
"""

import argparse
import logging
import statistics
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn.composing import compose
from fedunlearn.config import Config

SIMULATIONS = Path(__file__).parent.parent / "simulations"


def main() -> None:
    """Print one table: means over seeds."""
    p = argparse.ArgumentParser("python -m benchmarks.batch_norm", description=__doc__)
    p.add_argument("--app", default="digits")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--fractions", type=float, nargs="*", default=[0, 0.03, 0.1, 0.3, 1])
    p.add_argument("settings", nargs="*", help="of every run, as rounds=20")
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    table = []
    for fraction in options.fractions:
        rows = []
        for seed in range(options.seeds):
            words = [*options.settings, "strategy=leave", f"seed={seed}", f"batch_norm_fraction={fraction}"]
            rows.append(measured(compose(SIMULATIONS / options.app / "conf", words)))
            print(f"fraction {fraction:g}  seed {seed} ", *(f"{x:.3f}" for x in rows[-1]), flush=True)
        table.append([f"{fraction:g}", *map(timing.mean_spread, zip(*rows, strict=True))])
    columns = ("fraction", "retain clients", "client ID", "test", "work, % of training", "seconds, % of training")
    timing.table(f"{options.seeds} seeds, mean ± standard deviation", columns, table)


def measured(config: Config) -> tuple[float, ...]:
    """Train, and give the last accuracies and what the statistics cost."""
    with federation(config) as trained:
        rows = [row for row in trained.run.metrics() if row["kind"] == "round"]
    last = rows[-1]
    shares = [
        100 * statistics.median(row["batch_norm"].get(cost, 0) / row["train"][cost] for row in rows[1:])
        for cost in ("work", "seconds")
    ]
    return last["retain"]["class"], last["retain"]["client_id"], last["test"]["class"], *shares


if __name__ == "__main__":
    main()
