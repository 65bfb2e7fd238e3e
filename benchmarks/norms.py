"""BatchNorm, with and without recalibration, beside GroupNorm, stage by stage: `python -m benchmarks.norms`.

Three clients are forgotten one after the other from a base of all, without training in between, on handwritten digits;
gold of each stage is trained from scratch without them. Accuracies of the last one forgotten, of the others and on the
test images when the model is served.
"""

import argparse
import logging
from collections.abc import Iterator

import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn.config import Config
from fedunlearn.federation.requests import Forgetting
from fedunlearn.nn.evaluate import Counts
from fedunlearn.study.federated.settings import load

VARIANTS = {
    "BatchNorm, recalibrated": ("batch", True),
    "BatchNorm as it was": ("batch", False),
    "GroupNorm": ("group", False),
}
ORDER = (0, 1, 2)
Row = tuple[float, float, float]  # the client that left last, the others, test


def main() -> None:
    """Print one table: means over seeds, gold beside."""
    p = argparse.ArgumentParser("python -m benchmarks.norms", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--strategies", nargs="*", default=["subset", "ssd"])
    p.add_argument("settings", nargs="*", default=["dataset=digits", "scale=laptop"])
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found: dict[tuple[str, str, int], list[Row]] = {}
    for seed in range(options.seeds):
        for name, (norm, again) in VARIANTS.items():
            words = [*options.settings, f"model.norm={norm}", f"unlearn.recalibrate={str(again).lower()}"]
            for strategy in [*options.strategies, "gold"]:
                config = load(words).config("ce_dl", "leave" if strategy == "gold" else strategy, seed)
                rows = golds(config) if strategy == "gold" else stages(config)
                for stage, row in enumerate(rows, 1):
                    print(f"seed {seed}  {name}  {strategy}  stage {stage} ", *(f"{x:.3f}" for x in row), flush=True)
                    found.setdefault((name, strategy, stage), []).append(row)
    columns = ("normalisation", "strategy", "stage", "forgotten", "others", "test")
    table = [[*map(str, key), *map(timing.mean_spread, zip(*rows, strict=True))] for key, rows in found.items()]
    timing.table(f"{options.seeds} seeds, mean ± standard deviation", columns, table)


def stages(config: Config) -> Iterator[Row]:
    """After each of the requests."""
    with federation(config) as (strategy, grid):
        for client in ORDER:
            strategy.run.ledger.file([client])
            strategy.serve_requests(grid, no_more_rounds=True)
            yield measured(strategy, client)


def golds(config: Config) -> Iterator[Row]:
    """Of the models that never knew them."""
    for stage, client in enumerate(ORDER, 1):
        with federation(config, without=ORDER[:stage]) as (strategy, _):
            yield measured(strategy, client)


def measured(strategy: Forgetting, client: int) -> Row:
    """Of the current model."""
    others = sum((strategy.worker.evaluate(c) for c in strategy.active), Counts())
    return strategy.worker.evaluate(client).class_accuracy, others.class_accuracy, strategy.accuracy_on_test()


if __name__ == "__main__":
    main()
