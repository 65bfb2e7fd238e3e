"""What a federated study's last models predict, image by image: `python -m benchmarks.final_models SETTINGS`.

The settings are those of a study that is done. Two models of equal accuracy may err on other images. So every
strategy's predictions are compared with those of the retrained model, and the retrained model's with those of retrained
models of the other seeds, on the forgotten clients' images and on test images. `subset` relabels with predictions on
the server's held-out images, which are test images, and on these the study measures test accuracy and memorisation gap.
So both are measured on the test images beyond `data.test_limit` too, which nobody has used.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from benchmarks import timing
from fedunlearn.build import open_dataset
from fedunlearn.config import Config
from fedunlearn.data.decoded import Split
from fedunlearn.nn.evaluate import predict
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run
from fedunlearn.study.dag.command import study_folder
from fedunlearn.study.federated.runs import RUN
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.pooled.pool import NOBODY, Examples
from fedunlearn.study.pooled.workspace import Workspace

RETRAINED = "retrained"
COLUMNS = (
    "request", "pipeline", "seed", "model", "round", "forgotten", "gap: server's", "unused", "test: server's", "unused",
    "agreement: forgotten", "test", "divergence: forgotten", "test",
)  # fmt: skip


class Final(NamedTuple):
    """What a run's last model predicts.

    Attributes:
        forgotten: class probabilities of the forgotten clients' images, [N, K].
        test: of all test images, [T, K].
        round: rounds that are in the model.
        accuracies: on the forgotten clients' images; memorisation gaps against the server's held-out images and the
            unused test images; accuracies on these two.
    """

    forgotten: Tensor
    test: Tensor
    round: int
    accuracies: list[float]


def main() -> None:
    """Print a row for every model that is there; of tasks that were copied from `results/` none is."""
    p = argparse.ArgumentParser("python -m benchmarks.final_models", description=__doc__)
    p.add_argument("settings", nargs="+")
    study = FederatedStudy(p.parse_args().settings)
    settings, plan, root = study.settings, study.plan, study_folder(study)  # type: ignore[arg-type]
    if not settings.data.test_limit:
        p.error("data.test_limit=0: the server has all test images, and none is unused")
    torch.set_num_threads(settings.train.threads)
    rows: list[list[str]] = []
    for case in plan.cases():
        forgotten = case.forgotten(case.last)
        found: dict[tuple[str, int, str], Final] = {}
        for pipeline, seed in plan.each():
            config = settings.config(pipeline, "leave", seed)
            everything = settings.data.model_copy(update={"test_limit": 0})
            test = open_dataset(config.model_copy(update={"data": everything})).test
            unused = beyond(test, settings.data.test_limit)
            tasks = {RETRAINED: plan.retrained(pipeline, forgotten, seed)}
            tasks |= {name: plan.forget(name, pipeline, case, seed) for name in settings.study.strategies}
            for name, task in tasks.items():
                if task.is_done(root) and (task.folder(root) / RUN / "checkpoints").is_dir():
                    model = study.workspace.new_model(pipeline, seed)
                    round_ = load(model, task.folder(root) / RUN, config)
                    found[pipeline, seed, name] = final(study.workspace, model, round_, forgotten, unused)
        for (pipeline, seed, name), ours in found.items():
            of_seed = {s: one for (p, s, n), one in found.items() if (p, n) == (pipeline, RETRAINED)}
            others = [one for s, one in of_seed.items() if (s != seed if name == RETRAINED else s == seed)]
            distances = np.mean([apart(ours, one) for one in others] or [[np.nan] * 4], axis=0)
            numbers = [f"{value:.3f}".replace("nan", "–") for value in (*ours.accuracies, *distances)]
            rows.append([case.name, pipeline, str(seed), name, str(ours.round), *numbers])
    title = f"last models of {root.name}; agreement with the retrained model and divergence from it"
    timing.table(title, COLUMNS, rows, width=170)


def load(model: TwoHeadModel, folder: Path, config: Config) -> int:
    """Load the model that a run ends with; returns after how many rounds."""
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        return Run(folder, config, ledger).restore(model, beside=None)[0]
    finally:
        ledger.close()


def final(workspace: Workspace, model: TwoHeadModel, round_: int, forgotten: Sequence[int], unused: Split) -> Final:
    """Predict with a run's last model."""
    pool, precision = workspace.pool, workspace.precision
    theirs = pool.predict(model, pool.of_clients(forgotten), precision)
    nobody = np.full(len(unused.labels), NOBODY)
    both = [pool.test, Examples.of(unused, nobody, workspace.device)]
    found = [predict(model, examples.batches(examples.all()), precision=precision) for examples in both]
    counts = torch.stack([workspace.class_counts(client) for client in forgotten]).sum(0)
    accuracy = theirs.total.class_accuracy
    gaps = [accuracy - predictions.expected_accuracy(counts) for predictions in found]
    tests = [predictions.total.class_accuracy for predictions in found]
    probs = torch.cat([predictions.class_probs for predictions in found])
    return Final(theirs.class_probs, probs, round_, [accuracy, *gaps, *tests])


def beyond(split: Split, limit: int) -> Split:
    """Give all images but those that `datasets.first_per_class` keeps."""
    classes = np.unique(split.labels)
    rest = np.sort(np.concatenate([np.flatnonzero(split.labels == k)[limit // len(classes) :] for k in classes]))
    return Split(split.images[rest], split.labels[rest])


def apart(ours: Final, retrained: Final) -> list[float]:
    """Compare with a retrained model: agreement, then divergence, each of the forgotten and of the test images."""
    pairs = ((ours.forgotten, retrained.forgotten), (ours.test, retrained.test))
    return [measure(p, q) for measure in (agreement, divergence) for p, q in pairs]


def agreement(p: Tensor, q: Tensor) -> float:
    """Give the fraction of images of which two models find the same class likeliest."""
    return (p.argmax(1) == q.argmax(1)).double().mean().item()


def divergence(p: Tensor, q: Tensor) -> float:
    """Give the mean over images of the Jensen-Shannon divergence of two models' predictions, in bits: 0 to 1."""
    distances = jensenshannon(p.double().numpy(), q.double().numpy(), base=2, axis=1)  # type: ignore[call-overload]
    return float(np.square(distances).mean())


if __name__ == "__main__":
    main()
