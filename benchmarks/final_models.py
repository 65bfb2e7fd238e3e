"""What a federated study's models at its end say, image by image: compared with gold's answers, and on other images.

`python -m benchmarks.final_models SETTINGS`, the settings being those of a study that is done. Two models of equal
accuracy may err on other images: here every strategy's answers are compared with those of gold, and gold's with those
of gold models of the other seeds, on the forgotten clients' images and on test images. And since `subset` teaches
answers to the server's unseen images, on which the study measures test accuracy and memory gap, both are measured on
the test images beyond `data.test_limit` too.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from benchmarks import timing
from fedunlearn.build import open_dataset
from fedunlearn.data.datasets import Split
from fedunlearn.federation.client import Worker
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run
from fedunlearn.study.command import study_folder
from fedunlearn.study.federated.plan import Plan
from fedunlearn.study.federated.runs import RUN
from fedunlearn.study.federated.settings import load
from fedunlearn.study.pooled.laboratory import Laboratory

COLUMNS = (
    "request", "pipeline", "seed", "model", "round", "forgotten", "gap: server's", "others", "test: server's", "others",
    "same answer as gold: forgotten", "test", "divergence: forgotten", "test",
)  # fmt: skip


class Said(NamedTuple):
    """What a model says: probabilities of classes, [N, K], of the forgotten clients' images and of all test images;
    after how many rounds; and its accuracies."""

    forgotten: Tensor
    test: Tensor
    round: int
    accuracies: list[float]


def main() -> None:
    """Print a row for every model."""
    p = argparse.ArgumentParser("python -m benchmarks.final_models", description=__doc__)
    p.add_argument("settings", nargs="+")
    settings = load(p.parse_args().settings)
    if not settings.data.test_limit:
        p.error("data.test_limit=0: the server has all test images, and there are no others")
    torch.set_num_threads(settings.train.threads)
    plan, root, rows = Plan(settings, Laboratory(settings)), study_folder(settings), []
    for case in plan.cases():
        left, found = case.left(case.last), {}
        for pipeline, seed in plan.each():
            worker = Worker(settings.config(pipeline, "leave", seed))
            everything = replace(worker.config, data=replace(settings.data, test_limit=0))
            others = beyond(open_dataset(everything).test, settings.data.test_limit)
            steps = {"gold": plan.gold(pipeline, left, seed)}
            steps |= {name: plan.forget(name, pipeline, case, seed) for name in settings.study.strategies}
            for name, step in steps.items():
                if step.is_done(root):
                    found[pipeline, seed, name] = said(worker, step.folder(root) / RUN, left, others)
        for (pipeline, seed, name), ours in found.items():
            of_seed = {s: gold for (p, s, n), gold in found.items() if (p, n) == (pipeline, "gold")}
            golds = [gold for s, gold in of_seed.items() if (s != seed if name == "gold" else s == seed)]
            distances = np.mean([apart(ours, gold) for gold in golds] or [[np.nan] * 4], axis=0)
            numbers = [f"{value:.3f}".replace("nan", "–") for value in (*ours.accuracies, *distances)]
            rows.append([case.name, pipeline, str(seed), name, str(ours.round), *numbers])
    timing.table(f"models at the end of {root.name}", COLUMNS, rows)


def said(worker: Worker, run: Path, left: tuple[int, ...], others: Split) -> Said:
    """By the model that a run ends with."""
    ledger = Ledger(run / "ledger.sqlite")
    try:
        round_, _ = Run(run, worker.config, ledger).restore(worker.model)
    finally:
        ledger.close()
    train = worker.dataset.train
    theirs = np.concatenate([worker.slices[client] for client in left])
    forgotten = worker.predict(Split(train.images[theirs], train.labels[theirs]))
    found = [worker.predict_test(), worker.predict(others)]
    accuracy, mix = forgotten.total.class_accuracy, worker.class_mix(left)
    gaps = [accuracy - unseen.expected_accuracy(mix) for unseen in found]
    tests = [unseen.total.class_accuracy for unseen in found]
    probs = torch.cat([unseen.class_probs for unseen in found])
    return Said(forgotten.class_probs, probs, round_, [accuracy, *gaps, *tests])


def beyond(split: Split, limit: int) -> Split:
    """All images but those that `datasets.first_per_class` keeps."""
    classes = np.unique(split.labels)
    rest = np.sort(np.concatenate([np.flatnonzero(split.labels == k)[limit // len(classes) :] for k in classes]))
    return Split(split.images[rest], split.labels[rest])


def apart(ours: Said, gold: Said) -> list[float]:
    """How often a model's answer is gold's, and their mean divergence; of the forgotten and of the test images each."""
    pairs = ((ours.forgotten, gold.forgotten), (ours.test, gold.test))
    return [measure(p, q) for measure in (agreement, divergence) for p, q in pairs]


def agreement(p: Tensor, q: Tensor) -> float:
    """The share of images of which two models find the same class likeliest."""
    return (p.argmax(1) == q.argmax(1)).double().mean().item()


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean over images of the Jensen-Shannon divergence of what two models say, in bits: 0 to 1."""
    return float(np.square(jensenshannon(p.double(), q.double(), base=2, axis=1)).mean())


if __name__ == "__main__":
    main()
