"""The client head in a federation, beside pooled training: `python -m benchmarks.client_head --root ARCHIVE`.

Class and client-ID accuracy of pooled training and of federations that differ in who trains the client head and in how
much its loss counts; work and bytes beside those of plain federated averaging.
"""

import argparse
import logging
import statistics
from dataclasses import fields

import numpy as np
import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn.runs.home import with_values
from fedunlearn.study.federated.settings import FederatedSettings, load
from fedunlearn.study.pooled.training import Recipe, Training
from fedunlearn.study.pooled.workspace import Workspace

VARIANTS = {  # who trains the head, and lambda_2
    "plain FedAvg, no client loss": ("local", 0.0),
    "head trained by clients, λ2 = 0.1": ("local", 0.1),
    "head trained by clients, λ2 = 0.3": ("local", 0.3),
    "head trained by the server, λ2 = 0": ("server", 0.0),
    "head trained by the server, λ2 = 0.03": ("server", 0.03),
    "head trained by the server, λ2 = 0.1": ("server", 0.1),
    "head trained by the server, λ2 = 0.3": ("server", 0.3),
}
EVERY = 2  # epochs of pooled training between measurements


def main() -> None:
    """Print a table of what each variant ends with; means over seeds."""
    p = argparse.ArgumentParser("python -m benchmarks.client_head", description=__doc__)
    p.add_argument("--root", help="of CIFAR-10's images (default: handwritten digits)")
    p.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--epochs", type=int, default=20, help="of pooled training")
    p.add_argument("--variants", nargs="*", default=list(VARIANTS))
    p.add_argument("settings", nargs="*")
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    images = ["dataset=cifar10", "data.name=folder", f"data.root={options.root}"]
    words = images if options.root else ["dataset=digits"]
    settings = load([*words, "scale=laptop", f"rounds={options.rounds}", *options.settings])
    found: dict[str, list[list[float]]] = {}
    for seed in options.seeds:
        path = pooled(settings, seed, options.epochs)
        for train, test, client_id in path:
            print(f"seed {seed}  pooled  class {train:.3f}  test {test:.3f}  client ID {client_id:.3f}", flush=True)
        first = None
        for name in options.variants:
            (train, test, client_id), work, size = federated(settings, seed, *VARIANTS[name])
            first = first or (work, size)
            at_test, at_train = pooled_id(path, 1, test), pooled_id(path, 0, train)
            ratios = [client_id / at_test, client_id / at_train]
            row = [train, test, client_id, *ratios, work / first[0], size / first[1]]
            print(f"seed {seed}  {name}  ", *(f"{value:.3f}" for value in row), flush=True)
            found.setdefault(name, []).append(row)
    columns = ("class, train", "class, test", "client ID", "÷ pooled's, equal test", "equal train", "work", "bytes")
    rows = [[name, *(timing.mean_spread(values) for values in zip(*own, strict=True))] for name, own in found.items()]
    timing.table(f"{options.rounds} rounds, {len(options.seeds)} seeds", ("", *columns), rows)


def federated(settings: FederatedSettings, seed: int, head_by: str, weight: float) -> tuple[list[float], float, float]:
    """Give class (train, test) and client-ID accuracy in the end, processor seconds and bytes of a round."""
    values = {"train.client_head_by": head_by, "loss.client_weight": weight, "loss.disentangle_weight": 0.0}
    with federation(with_values(settings.config("ce", "leave", seed), values)) as trained:
        total = trained.evaluate(trained.federation.retain)
        accuracies = [total.class_accuracy, trained.test_accuracy, total.client_accuracy]
        costs = [row["train"] for row in trained.run.metrics() if row["kind"] == "round"]
    work, size = (statistics.median(cost[name] for cost in costs) for name in ("work", "bytes"))
    return accuracies, work, size


def pooled(settings: FederatedSettings, seed: int, epochs: int) -> list[list[float]]:
    """Give class (train, test) and client-ID accuracy of pooled training with the paper's loss, every few epochs."""
    workspace = Workspace(settings, precision=settings.train.precision, attacked=settings.attacked)
    model, pool = workspace.new_model("ce", seed), workspace.pool
    training = Training(model, pool.train, pool.train.all(), pooled_recipe(settings, epochs), seed)
    path: list[list[float]] = []
    while training.epoch < epochs:
        training.run_epoch()
        if training.epoch % EVERY == 0:
            predictions = workspace.predictions(model)
            total = predictions.train.total
            path.append([total.class_accuracy, predictions.test.class_accuracy, total.client_accuracy])
    return path


def pooled_recipe(settings: FederatedSettings, epochs: int) -> Recipe:
    """Give local training's recipe for pooled data, with the paper's loss from the first epoch on."""
    train = settings.train.model_dump()
    kept = {field.name: train[field.name] for field in fields(Recipe) if field.name in train}
    loss = {"class_weight": 1.0, "client_weight": 1.0, "disentangle_weight": 0.1}
    return Recipe(**kept | {"epochs": epochs, "warmup": 0.0, "loss": loss})


def pooled_id(path: list[list[float]], column: int, accuracy: float) -> float:
    """Give pooled training's client-ID accuracy when its accuracy in `column` was first that.

    Its last, if it never was.
    """
    best = np.maximum.accumulate([row[column] for row in path])
    return float(np.interp(accuracy, best, [row[2] for row in path]))


if __name__ == "__main__":
    main()
