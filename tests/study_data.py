"""A pool of a few noisy patterns, and short studies of digits."""

import json
import sys

import numpy as np
import torch

from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.study.dag.command import run_study
from fedunlearn.study.pooled.pool import Examples, Pool
from fedunlearn.study.pooled.study import PaperStudy
from fedunlearn.study.pooled.training import Recipe

LOSS = {"class_weight": 1.0, "client_weight": 1.0, "disentangle_weight": 0.1}


def pool(count=60, clients=4, classes=3, size=8, device="cpu"):
    random = np.random.default_rng(0)
    labels, owners = np.arange(count) % classes, np.arange(count) // classes % clients
    patterns = random.integers(256, size=(classes, size, size, 3))
    noisy = np.clip(patterns[labels] + random.normal(0, 40, (count, size, size, 3)), 0, 255).astype(np.uint8)
    train = Examples(*(torch.from_numpy(array).to(device) for array in (noisy, labels, owners)))
    test = Examples(train.images[:12], train.labels[:12], torch.full((12,), -1, device=device))
    return Pool(train, test, clients)


def model(clients=4, classes=3, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TwoHeadResNet18(classes, clients, width=8)


def exact(model):
    """In fp64, so that two devices differ in the last digits alone: a GPU takes tf32 for fp32."""
    model.double().register_forward_pre_hook(lambda _, arguments: (arguments[0].double(), *arguments[1:]))
    return model


def recipe(**changes):
    values = {
        "epochs": 4, "batch_size": 16, "lr": 0.02, "schedule": "steps", "momentum": 0.9, "weight_decay": 5e-4,
        "crop_padding": 2, "flip": True, "precision": "fp32", "warmup": 0.25, "loss": LOSS,
    }  # fmt: skip
    return Recipe(**values | changes)


FEW = ["data.limit=500", "data.test_limit=200"]
SHORT = ["dataset=digits", "scale=laptop", "study.workers=1", "study.seeds=[0]", "study.order=[0]", *FEW]
TRAIN = [*SHORT, "study.stages=[train]", "study.pipelines=[ce_dl]", "learning.epochs=3"]


def study(kind, words, *, only_plan=False):
    """Run a study as the command line does; returns the exit status."""
    set_up()
    try:
        if kind == "paper":
            return run_study(PaperStudy(words), only_plan=only_plan)
        from fedunlearn.study.federated.study import FederatedStudy

        return run_study(FederatedStudy(words), only_plan=only_plan)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


def results(home, study="digits-laptop"):
    found = [json.loads(file.read_text()) for file in (home / "studies" / study / "tasks").glob("*/result.json")]
    return {result["task"]: result for result in found}


if __name__ == "__main__":
    sys.exit(study(sys.argv[1], sys.argv[2:]))
