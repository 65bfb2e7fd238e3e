"""Alpha and lambda chosen without gold, beside the choice made with it: `python -m benchmarks.tuning`.

Every client in turn is forgotten from a base of all, for IID and Dirichlet splits and several seeds, on handwritten
digits. What gold will answer on the forgotten images is foretold from unseen images of their class mix (as the model
answers them, and as it would have without the client: `unseen.foretold`); SSD's strength is chosen to match that
(`unlearn.tune=auto`), and once more to match gold itself. Beside them, what `subset` leaves, which has nothing to
choose, and how far gold models of two seeds are apart: no foretelling can be asked to be nearer.
"""

import argparse
import csv
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn.config import Config
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.requests import Forgetting
from fedunlearn.runs.ledger import State
from fedunlearn.study.federated.settings import load
from strategies.ssd import SelectiveDampening, nearest

SPLITS = {"iid": ("iid", 0.6), "Dirichlet 0.6": ("dirichlet", 0.6), "Dirichlet 0.1": ("dirichlet", 0.1)}
FEWEST = 10  # images of a client that is worth forgetting


def main() -> None:
    """Print one table: means over clients and seeds; with `--csv` every target's line goes there."""
    p = argparse.ArgumentParser("python -m benchmarks.tuning", description=__doc__)
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--settings", nargs="*", default=["dataset=digits", "scale=laptop"])
    p.add_argument("--splits", nargs="*", default=list(SPLITS))
    p.add_argument("--csv", type=Path)
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows: list[dict] = []
    for split in options.splits:
        kind, alpha = SPLITS[split]
        words = [*options.settings, "federated=true", f"partition.kind={kind}", f"partition.dirichlet_alpha={alpha}"]
        for seed in options.seeds:
            for row in targets(load(words).config("ce_dl", "ssd", seed)):
                rows.append({"split": split, "seed": seed, **row})
                print(rows[-1], file=sys.stderr, flush=True)
                if options.csv:
                    write(rows, options.csv)
    columns = (
        "targets", "gold", "|another gold − gold|", "|unseen − gold|", "|foretold − gold|", "|auto − gold|",
        "|with gold − gold|", "|subset − gold|", "test auto", "test with", "test subset", "gold's test",
    )  # fmt: skip
    table = [[split, *summary([row for row in rows if row["split"] == split])] for split in options.splits]
    timing.table(f"{len(options.seeds)} seeds, mean ± standard deviation over targets", ("split", *columns), table)


def write(rows: list[dict], path: Path) -> None:
    """As CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def targets(config: Config) -> Iterator[dict[str, float]]:
    """A row for every client as the one to forget."""
    ours = replace(config, strategy="subset")
    with federation(config) as (dampening, grid), federation(ours) as (teaching, own_grid):
        before = {name: value.clone() for name, value in dampening.model.state_dict().items()}
        for client in (c for c in dampening.active if dampening.federation.examples[c] >= FEWEST):
            with federation(replace(config, strategy="leave"), without=[client]) as (gold, _):
                answer = gold.worker.evaluate(client)
                row = {"client": client, "gold": answer.class_accuracy, "gold_loss": answer.mean_loss}
                row["gold_test"] = gold.accuracy_on_test()
            dampening.model.load_state_dict(before)
            unseen, mix = dampening.worker.predict_test(), dampening.worker.class_mix([client])
            row |= {"unseen": unseen.expected_accuracy(mix), "unseen_loss": unseen.expected_loss(mix)}
            with leaving(dampening, client):
                foretold = dampening.foretold(unseen)
                row |= {"predicted": foretold.expected_accuracy(mix), "predicted_loss": foretold.expected_loss(mix)}
                full, forget = dampening.fishers([client], grid, {})
                for name, target in (("auto", row["predicted"]), ("with", row["gold"])):
                    dampening.model.load_state_dict(before)
                    dampen(dampening, grid, client, full, forget, target)
                    row |= outcome(dampening, client, name)
            teaching.model.load_state_dict(before)
            with leaving(teaching, client):
                teaching.forget([client], own_grid, {})
            yield row | outcome(teaching, client, "subset")


@contextmanager
def leaving(strategy: Forgetting, client: int) -> Iterator[None]:
    """The client is no longer active; afterwards it is again."""
    ledger = strategy.run.ledger
    request = ledger.advance(ledger.file([client])[0], State.COLLECTING)
    try:
        yield
    finally:
        ledger.advance(request, State.REFUSED)


def dampen(strategy: SelectiveDampening, grid: LocalGrid, client: int, full, forget, target: float) -> None:
    """As chosen for `target`."""
    chosen = nearest(strategy.search([client], full, forget, target, grid, {}), target)
    strategy.dampen([client], full, forget, alpha=chosen["alpha"], lambda_=chosen["lambda_"])
    strategy.recalibrate(grid, {})


def outcome(strategy: Forgetting, client: int, name: str) -> dict[str, float]:
    """What the model says now."""
    forgotten = strategy.worker.evaluate(client)
    return {
        f"{name}_forgotten": forgotten.class_accuracy,
        f"{name}_loss": forgotten.mean_loss,
        f"{name}_test": strategy.accuracy_on_test(),
    }


def summary(rows: list[dict]) -> list[str]:
    """Of one split."""

    distances = [
        [abs(row[name] - row["gold"]) for row in rows]
        for name in ("unseen", "predicted", "auto_forgotten", "with_forgotten", "subset_forgotten")
    ]
    pairs = itertools.combinations(rows, 2)
    between = [abs(a["gold"] - b["gold"]) for a, b in pairs if a["client"] == b["client"]]
    means = [
        timing.mean_spread([row[name] for row in rows])
        for name in ("auto_test", "with_test", "subset_test", "gold_test")
    ]
    return [
        str(len(rows)),
        timing.mean_spread([row["gold"] for row in rows]),
        timing.mean_spread(between) if between else "",
        *map(timing.mean_spread, distances),
        *means,
    ]


if __name__ == "__main__":
    main()
