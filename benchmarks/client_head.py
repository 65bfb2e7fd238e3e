"""The client head in a federation, beside pooled training: `python -m benchmarks.client_head --root ARCHIVE`.

Class and client-ID accuracy of pooled training and of federations that differ in who trains the client head and in how
much its loss counts; work and bytes beside those of plain federated averaging.
"""

import argparse
import logging
import statistics
from dataclasses import replace

import numpy as np
import torch

from benchmarks import timing
from benchmarks.local import federation
from fedunlearn.config import Config
from fedunlearn.nn.evaluate import Counts
from fedunlearn.study.federated.settings import Settings, load
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.training import Training

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
            shares = [client_id / at_test, client_id / at_train]
            row = [train, test, client_id, *shares, work / first[0], size / first[1]]
            print(f"seed {seed}  {name}  ", *(f"{value:.3f}" for value in row), flush=True)
            found.setdefault(name, []).append(row)
    columns = ("class, train", "class, test", "client ID", "÷ pooled's, equal test", "equal train", "work", "bytes")
    rows = [[name, *(timing.mean_spread(values) for values in zip(*own, strict=True))] for name, own in found.items()]
    timing.table(f"{options.rounds} rounds, {len(options.seeds)} seeds", ("", *columns), rows)


def federated(settings: Settings, seed: int, head: str, weight: float) -> tuple[list[float], float, float]:
    """Class (train, test) and client-ID accuracy in the end, seconds of all workers and bytes of a round."""
    config: Config = settings.config("ce", "leave", seed)
    config = replace(config, train=replace(config.train, client_head=head))
    config = replace(config, loss=replace(config.loss, client_weight=weight, disentangle_weight=0.0))
    with federation(config) as (strategy, _):
        total = sum((strategy.worker.evaluate(client) for client in strategy.active), Counts())
        accuracies = [total.class_accuracy, strategy.accuracy_on_test(), total.client_accuracy]
        costs = [row["train"] for row in strategy.run.metrics() if row["kind"] == "round"]
    return accuracies, *(statistics.median(cost[name] for cost in costs) for name in ("work", "bytes"))


def pooled(settings: Settings, seed: int, epochs: int) -> list[list[float]]:
    """Class (train, test) and client-ID accuracy of pooled training with the paper's loss, every few epochs."""
    lab = Laboratory(settings)
    loss = {"class_weight": 1.0, "client_weight": 1.0, "disentangle_weight": 0.1}
    recipe = replace(settings.recipe("ce"), epochs=epochs, warmup=0.0, loss=loss)
    model = lab.new_model("ce", seed)
    training, path = Training(model, lab.pool.train, lab.pool.train.all(), recipe, seed), []
    while training.epoch < epochs:
        training.run_epoch()
        if training.epoch % EVERY == 0:
            answers = lab.answers(model)
            total = answers.train.total
            path.append([total.class_accuracy, answers.test.class_accuracy, total.client_accuracy])
    return path


def pooled_id(path: list[list[float]], column: int, accuracy: float) -> float:
    """Pooled training's client-ID accuracy when its accuracy in `column` was first that; its last, if it never was."""
    best = np.maximum.accumulate([row[column] for row in path])
    return float(np.interp(accuracy, best, [row[2] for row in path]))


if __name__ == "__main__":
    main()
