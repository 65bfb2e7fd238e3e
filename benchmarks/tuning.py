"""Alpha and lambda chosen without a retrained model, beside the choice made with one: `python -m benchmarks.tuning`.

Every client in turn is forgotten from a base of all, for IID and Dirichlet splits and several seeds, on handwritten
digits. What the retrained model will get right of the forgotten images is estimated from held-out images (the test
images) with the same class counts: once from the present model's predictions, and once from the estimate of the
retrained model's (`Federation.estimate_retrained`). SSD's strength is chosen to match that estimate
(`unlearn.tune=auto`), and once more to match the retrained model itself. Beside them is what `subset` leaves, which has
nothing to choose, and how far retrained models of two seeds are apart: no estimate can be asked to be nearer.
"""

import argparse
import csv
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.local import Trained, federation
from fedunlearn.federation.handle import ForgetSet
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.strategy import strategy_of
from fedunlearn.runs.ledger import State
from fedunlearn.study.federated.settings import FederatedSettings, load
from strategies.ssd import SelectiveDampening, nearest

SPLITS = {"iid": ("iid", 0.6), "Dirichlet 0.6": ("dirichlet", 0.6), "Dirichlet 0.1": ("dirichlet", 0.1)}
FEWEST = 10  # images of a client that is worth forgetting

Row = dict[str, Any]


def main() -> None:
    """Print one table: means over clients and seeds; with `--csv` every forgotten client's line goes there."""
    p = argparse.ArgumentParser("python -m benchmarks.tuning", description=__doc__)
    p.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    p.add_argument("--settings", nargs="*", default=["dataset=digits", "scale=laptop"])
    p.add_argument("--splits", nargs="*", default=list(SPLITS))
    p.add_argument("--csv", type=Path)
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for split in options.splits:
        kind, alpha = SPLITS[split]
        settings = load([*options.settings, f"partition.kind={kind}", f"partition.dirichlet_alpha={alpha}"])
        for seed in options.seeds:
            for row in targets(settings, seed):
                rows.append({"split": split, "seed": seed, **row})
                print(rows[-1], file=sys.stderr, flush=True)
                if options.csv:
                    write(rows, options.csv)
    columns = (
        "targets", "retrained: r.", "another r.", "held-out", "estimate", "auto", "with r.", "subset",
        "test: auto", "with r.", "subset", "r.",
    )  # fmt: skip
    table = [[split, *summary([row for row in rows if row["split"] == split])] for split in options.splits]
    title = (
        f"{len(options.seeds)} seeds, mean ± standard deviation over forgotten clients: accuracy on their images of "
        "the retrained model r., distances from it, and accuracies on test images"
    )
    timing.table(title, ("split", *columns), table)


def write(rows: list[Row], path: Path) -> None:
    """Write the rows as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def targets(settings: FederatedSettings, seed: int) -> Iterator[Row]:
    """Give a row for every client as the one to forget."""
    configs = {name: settings.config("ce_dl", name, seed) for name in ("ssd", "subset", "leave")}
    ssd, subset = strategy_of(configs["ssd"]), strategy_of(configs["subset"])
    assert isinstance(ssd, SelectiveDampening)
    with federation(configs["ssd"]) as dampened, federation(configs["subset"]) as relabelled:
        before, own_before = dampened.federation.state, relabelled.federation.state
        examples = dampened.federation.nodes.examples
        for client in (c for c in dampened.federation.retain if examples[c] >= FEWEST):
            with federation(configs["leave"], without=[client]) as retrained:
                row: Row = {"client": client} | outcome(retrained, client, "retrained")
            dampened.federation.state = before
            held_out, class_counts = dampened.federation.predictions(), dampened.class_counts(client)
            row["held_out"] = held_out.expected_accuracy(class_counts)
            row["held_out_loss"] = held_out.expected_loss(class_counts)
            with taken_up(dampened, client) as forget:
                estimate = dampened.federation.estimate_retrained(held_out)
                row["estimate"] = estimate.expected_accuracy(class_counts)
                row["estimate_loss"] = estimate.expected_loss(class_counts)
                full, forget_fisher = ssd.fishers(dampened.federation, forget)
                for name, target in (("auto", row["estimate"]), ("with", row["retrained_forgotten"])):
                    dampened.federation.state = before
                    dampen(ssd, dampened, forget, full, forget_fisher, target)
                    row |= outcome(dampened, client, name)
            relabelled.federation.state = own_before
            with taken_up(relabelled, client) as forget:
                subset.forget(relabelled.federation, forget)
            yield row | outcome(relabelled, client, "subset")


@contextmanager
def taken_up(trained: Trained, client: int) -> Iterator[ForgetSet]:
    """Let a request for the client be taken up, as while a strategy is at work; afterwards it is as if never made."""
    ledger = trained.run.ledger
    request = ledger.advance(ledger.file([client])[0], State.COLLECTING)
    forget = ForgetSet((client,))
    try:
        with trained.federation.applying(forget):
            yield forget
    finally:
        ledger.advance(request, State.REFUSED)


def dampen(
    ssd: SelectiveDampening, trained: Trained, forget: ForgetSet, full: Tensors, forget_fisher: Tensors, target: float
) -> None:
    """Dampen as is chosen for `target`."""
    chosen = nearest(ssd.search(trained.federation, forget, full, forget_fisher, target), target)
    ssd.dampen(trained.federation, full, forget_fisher, alpha=chosen["alpha"], lambda_=chosen["lambda_"])
    trained.federation.recalibrate_batch_norm()


def outcome(trained: Trained, client: int, name: str) -> Row:
    """Measure the present model on the forgotten client's images and on the test images."""
    forgotten = trained.evaluate([client])
    return {
        f"{name}_forgotten": forgotten.class_accuracy,
        f"{name}_loss": forgotten.mean_loss,
        f"{name}_test": trained.test_accuracy,
    }


def summary(rows: list[Row]) -> list[str]:
    """Give the cells of one split: accuracies, and distances from the retrained model's."""
    distances = [
        [abs(row[name] - row["retrained_forgotten"]) for row in rows]
        for name in ("held_out", "estimate", "auto_forgotten", "with_forgotten", "subset_forgotten")
    ]
    pairs = itertools.combinations(rows, 2)
    between = [abs(a["retrained_forgotten"] - b["retrained_forgotten"]) for a, b in pairs if a["client"] == b["client"]]
    means = [
        timing.mean_spread([row[name] for row in rows])
        for name in ("auto_test", "with_test", "subset_test", "retrained_test")
    ]
    return [
        str(len(rows)),
        timing.mean_spread([row["retrained_forgotten"] for row in rows]),
        timing.mean_spread(between) if between else "",
        *map(timing.mean_spread, distances),
        *means,
    ]


if __name__ == "__main__":
    main()
