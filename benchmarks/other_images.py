"""Whether what a federated study measures on the server's unseen images holds for others as well.

`python -m benchmarks.other_images SETTINGS`, the settings being those of a study that is done: `subset` teaches answers
to the server's unseen images, and the study measures test accuracy and memory gap on the same. Here both are measured
on the test images beyond `data.test_limit` too, of the model that each strategy ends with.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import timing
from fedunlearn.datasets import Split
from fedunlearn.evaluate import Counts
from fedunlearn.ledger import Ledger
from fedunlearn.runs import Run
from fedunlearn.study.command import study_folder
from fedunlearn.study.federated.plan import Plan
from fedunlearn.study.federated.runs import RUN
from fedunlearn.study.federated.settings import load
from fedunlearn.study.laboratory import Laboratory
from fedunlearn.study.steps import Step
from fedunlearn.worker import Worker, open_dataset


def main() -> None:
    """Print a row for every model."""
    p = argparse.ArgumentParser("python -m benchmarks.other_images", description=__doc__)
    p.add_argument("settings", nargs="+")
    settings = load(p.parse_args().settings)
    if not settings.data.test_limit:
        p.error("data.test_limit=0: the server has all test images, and there are no others")
    torch.set_num_threads(settings.train.threads)
    plan, root, rows = Plan(settings, Laboratory(settings)), study_folder(settings), []
    for pipeline, seed in plan.each():
        worker = Worker(settings.config(pipeline, "leave", seed))
        everything = replace(worker.config, data=replace(settings.data, test_limit=0))
        others = beyond(open_dataset(everything).test, settings.data.test_limit)
        for case in plan.cases():
            left = case.left(case.last)
            golds = {"gold": plan.gold(pipeline, left, seed)}
            steps = golds | {name: plan.forget(name, pipeline, case, seed) for name in settings.study.strategies}
            for name, step in steps.items():
                if step.is_done(root):
                    rows.append([case.name, pipeline, str(seed), name, *measured(worker, step, root, left, others)])
    columns = (
        "request", "pipeline", "seed", "model", "round", "forgotten", "gap: server's", "others", "test: server's",
        "others",
    )  # fmt: skip
    title = f"on {settings.data.test_limit} images of the server and on {len(others.labels)} others"
    timing.table(title, columns, rows)


def beyond(split: Split, limit: int) -> Split:
    """All images but those that `datasets.first_per_class` keeps."""
    classes = np.unique(split.labels)
    rest = np.sort(np.concatenate([np.flatnonzero(split.labels == k)[limit // len(classes) :] for k in classes]))
    return Split(split.images[rest], split.labels[rest])


def measured(worker: Worker, step: Step, root: Path, left: tuple[int, ...], others: Split) -> list[str]:
    """Of the model that a step ends with."""
    ledger = Ledger(step.folder(root) / RUN / "ledger.sqlite")
    try:
        round_, _ = Run(step.folder(root) / RUN, worker.config, ledger).restore(worker.model)
    finally:
        ledger.close()
    forgotten = sum(map(worker.evaluate, left), Counts()).class_accuracy
    found = [worker.predict_test(), worker.predict(others)]
    gaps = [forgotten - said.expected_accuracy(worker.class_mix(left)) for said in found]
    tests = [said.total.class_accuracy for said in found]
    return [str(round_), *(f"{value:.3f}" for value in (forgotten, *gaps, *tests))]


if __name__ == "__main__":
    main()
