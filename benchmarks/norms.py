"""BatchNorm with estimated and with averaged statistics, beside GroupNorm: `python -m benchmarks.norms`.

Three clients are forgotten one after the other from a base of all, without training in between, on handwritten digits.
The retrained model of each stage is trained from scratch without them. Printed are class accuracies of the model right
after a request: on the client that was forgotten last, on the retain clients and on the test images.
"""

import argparse
import logging
from collections.abc import Iterator

import torch

from benchmarks import timing
from benchmarks.local import Trained, federation
from fedunlearn.config import Config
from fedunlearn.runs.home import with_values
from fedunlearn.study.federated.settings import load

VARIANTS = {
    "BatchNorm, estimated": ("batch", 0.1),
    "BatchNorm, averaged": ("batch", 0),
    "GroupNorm": ("group", 0),
}
ORDER = (0, 1, 2)
RETRAINED = "retrained"
Row = tuple[float, float, float]  # the client that was forgotten last, the retain clients, test


def main() -> None:
    """Print one table: means over seeds, the retrained model beside."""
    p = argparse.ArgumentParser("python -m benchmarks.norms", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--strategies", nargs="*", default=["subset", "ssd"])
    p.add_argument("settings", nargs="*", default=["dataset=digits", "scale=laptop"])
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings = load(options.settings)
    found: dict[tuple[str, str, int], list[Row]] = {}
    for seed in range(options.seeds):
        for name, (norm, fraction) in VARIANTS.items():
            for strategy in [*options.strategies, RETRAINED]:
                chosen = "leave" if strategy == RETRAINED else strategy
                values = {"model.norm": norm, "batch_norm_fraction": fraction}
                config = with_values(settings.config("ce_dl", chosen, seed), values)
                rows = retrained(config) if strategy == RETRAINED else stages(config)
                for stage, row in enumerate(rows, 1):
                    print(f"seed {seed}  {name}  {strategy}  stage {stage} ", *(f"{x:.3f}" for x in row), flush=True)
                    found.setdefault((name, strategy, stage), []).append(row)
    columns = ("normalisation", "strategy", "stage", "forgotten", "retain clients", "test")
    table = [[*map(str, key), *map(timing.mean_spread, zip(*rows, strict=True))] for key, rows in found.items()]
    timing.table(f"{options.seeds} seeds, mean ± standard deviation", columns, table)


def stages(config: Config) -> Iterator[Row]:
    """Measure a strategy's model after each of the requests."""
    with federation(config) as trained:
        for client in ORDER:
            trained.forget(client)
            yield measured(trained, client)


def retrained(config: Config) -> Iterator[Row]:
    """Measure the models that never knew the clients of each stage."""
    for stage, client in enumerate(ORDER, 1):
        with federation(config, without=ORDER[:stage]) as trained:
            yield measured(trained, client)


def measured(trained: Trained, client: int) -> Row:
    """Measure the present model."""
    retain = trained.evaluate(trained.federation.retain)
    return trained.evaluate([client]).class_accuracy, retain.class_accuracy, trained.test_accuracy


if __name__ == "__main__":
    main()
