"""Alpha and lambda chosen without gold, beside the choice made with it: `python -m benchmarks.tuning`.

Every client in turn is forgotten from a base of all, for IID and Dirichlet splits and several seeds, on handwritten
digits. What gold will answer on the forgotten images is foretold by unseen images of their class mix; SSD's strength is
chosen to match that (`unlearn.tune=auto`), and once more to match gold itself.
"""

import argparse
import csv
import logging
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn import unlearn
from fedunlearn.config import Config
from fedunlearn.study.federated.settings import load
from strategies.ssd import SelectiveDampening, nearest

SPLITS = {"iid": ("iid", 0.6), "Dirichlet 0.6": ("dirichlet", 0.6), "Dirichlet 0.1": ("dirichlet", 0.1)}
FEWEST = 10  # images of a client that is worth forgetting


def main() -> None:
    """Print one table: means over clients and seeds; with `--csv` every target's line goes there."""
    p = argparse.ArgumentParser("python -m benchmarks.tuning", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--settings", nargs="*", default=["dataset=digits", "scale=laptop"])
    p.add_argument("--splits", nargs="*", default=list(SPLITS))
    p.add_argument("--csv", type=Path)
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for split in options.splits:
        kind, alpha = SPLITS[split]
        words = [*options.settings, "federated=true", f"partition.kind={kind}", f"partition.dirichlet_alpha={alpha}"]
        for seed in range(options.seeds):
            for row in targets(load(words).config("ce_dl", "ssd", seed)):
                rows.append({"split": split, "seed": seed, **row})
                print(rows[-1], file=sys.stderr, flush=True)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    columns = ("targets", "gold", "|predicted − gold|", "|auto − gold|", "|with gold − gold|", "test auto", "test with")
    table = [[split, *summary([row for row in rows if row["split"] == split])] for split in options.splits]
    timing.table(f"{options.seeds} seeds, mean ± standard deviation over targets", ("split", *columns), table)


def targets(config: Config) -> list[dict[str, float]]:
    """A row for every client as the one to forget."""
    found = []
    with federation(config) as (strategy, grid):
        before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
        for client in (c for c in strategy.active if strategy.federation.examples[c] >= FEWEST):
            with federation(replace(config, strategy="leave"), without=[client]) as (gold, _):
                answer = gold.worker.evaluate(client)
            strategy.model.load_state_dict(before)
            row = {"client": client, "gold": answer.class_accuracy, "gold_loss": answer.mean_loss}
            unseen, mix = strategy.worker.predict_test(), strategy.worker.class_mix([client])
            row |= {"predicted": unseen.expected_accuracy(mix), "predicted_loss": unseen.expected_loss(mix)}
            full, forget = strategy.fishers([client], grid, {})
            for name, target in (("auto", row["predicted"]), ("with", row["gold"])):
                strategy.model.load_state_dict(before)
                row |= outcome(strategy, grid, client, full, forget, target, name)
            found.append(row)
    return found


def outcome(strategy: SelectiveDampening, grid, client: int, full, forget, target: float, name: str) -> dict:
    """The model dampened as chosen for `target`."""
    chosen = nearest(strategy.search([client], full, forget, target, grid, {}), target)
    unlearn.step(strategy.model, full, forget, [client], alpha=chosen["alpha"], lambda_=chosen["lambda_"])
    strategy.recalibrate(grid, {})
    forgotten = strategy.worker.evaluate(client)
    return {
        f"{name}_forgotten": forgotten.class_accuracy,
        f"{name}_loss": forgotten.mean_loss,
        f"{name}_test": strategy.test_accuracy(),
    }


def summary(rows: list[dict]) -> list[str]:
    """Of one split."""

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"

    distances = [
        [abs(row[name] - row["gold"]) for row in rows] for name in ("predicted", "auto_forgotten", "with_forgotten")
    ]
    means = [spread([row[name] for row in rows]) for name in ("auto_test", "with_test")]
    return [str(len(rows)), spread([row["gold"] for row in rows]), *map(spread, distances), *means]


if __name__ == "__main__":
    main()
