"""Rounds of the same federation in pfl (pfl-research, PyPI name `pfl`): the seconds of each, as one line of JSON.

From the repository's root: its own environment (uv picks matching torch builds), one process, two sharing a round:

    uv venv --python 3.11 /tmp/pfl
    uv pip install --python /tmp/pfl/bin/python 'pfl[pytorch]==0.6.0' torch==2.15.0 torchvision==0.29.2 scikit-learn
    PYTHONPATH=. /tmp/pfl/bin/python benchmarks/peer_pfl.py --clients 10 --rounds 3 --width 8 --images 1000
    PYTHONPATH=. /tmp/pfl/bin/torchrun --standalone --nproc-per-node 2 benchmarks/peer_pfl.py --clients 10 --rounds 3

Clients are slices of resident uint8 images, shuffled for each round, scaled at each step, not augmented. Model, loss
and local SGD are fedunlearn's, in fp32; updates are averaged by examples. pfl can evaluate every client before and
after it trains, and always does so in round 0: here it evaluates in no round, or with --evaluate in all of them.
"""

# pyright: reportMissingImports=false
import argparse
import dataclasses
import json
import platform
import resource
import time
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed, get_default_device
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from fedunlearn.data.partition import partition
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Outputs, TwoHeadResNet18

DEFAULTS = {"clients": 10, "rounds": 3, "width": 8, "images": 1000, "batch": 32, "image-size": 32, "threads": 1}


class PflResNet18(TwoHeadResNet18):
    """The model with the two methods that pfl calls; images are uint8 [N, H, W, channels]."""

    def forward(self, images):
        """Scale as `fedunlearn.data.batches.scale` does, and compute."""
        return super().forward(images.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def loss(self, images, class_ids, client_ids):
        """Give the objective of one local step."""
        self.train()
        outputs: Outputs = self(images)
        return multi_task_loss(*outputs, class_ids, client_ids)

    @torch.no_grad()
    def metrics(self, images, class_ids, client_ids):
        """Give what is evaluated."""
        self.eval()
        return {"hits": Weighted(int((self(images).class_logits.argmax(1) == class_ids).sum()), len(images))}


class WithoutEvaluation(FederatedAveraging):
    """Federated averaging that evaluates no client, not even in round 0."""

    def get_next_central_contexts(self, *args, **kwargs):
        """Give the round's instructions, without evaluation; None after the last round."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        return contexts and tuple(dataclasses.replace(c, do_evaluation=False) for c in contexts), model, metrics


class Seconds(TrainingProcessCallback):
    """Notes when training began and each round ended (pfl's StopwatchCallback rounds)."""

    def on_train_begin(self, *, model):
        """Start."""
        self.times = [time.perf_counter()]
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """A round has ended."""
        self.times.append(time.perf_counter())
        return False, Metrics()


def main() -> None:
    """Run the rounds; the first process prints the line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in DEFAULTS.items():
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--data", help="folder of train_images.npy and train_labels.npy; without: random images")
    p.add_argument("--evaluate", action="store_true", help="every client, before and after training, in every round")
    options = p.parse_args()
    each = options.images // options.clients
    if options.clients % distributed.world_size:
        p.error("--clients is no multiple of the processes: pfl would train some clients twice and some not at all")
    if each < 1 or each % options.batch == 1:
        p.error(f"{each} images a client: no client, and no last batch, may have fewer than two")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    np.random.seed(0)
    images, labels = load(options, each * options.clients)
    seconds = run(options, images, labels)
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    peak = distributed.all_reduce([peak])[0]  # the sum over the processes
    result = {"peer": "pfl", **vars(options), "images": len(labels), "processes": distributed.world_size}
    result |= {"seconds": [round(s, 4) for s in seconds], "peak_rss_mib": round(float(peak), 1)}
    result |= {"images_per_s": round(len(labels) / np.median(seconds), 1), "pfl": version("pfl")}
    if distributed.global_rank == 0:
        print(json.dumps(result | {"torch": torch.__version__, "python": platform.python_version()}))


def load(options: argparse.Namespace, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose some of the decoded examples at random, or draw random bytes."""
    rng, size = np.random.default_rng(0), options.image_size
    if options.data is None:
        return rng.integers(256, size=(count, size, size, 3), dtype=np.uint8), rng.integers(10, size=count)
    images, labels = (np.load(f"{options.data}/train_{part}.npy", mmap_mode="r") for part in ("images", "labels"))
    chosen = np.sort(rng.choice(len(labels), count, replace=False))
    return images[chosen], labels[chosen]


def run(options: argparse.Namespace, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Train, and give the seconds of each round."""
    slices = [torch.from_numpy(own) for own in partition("iid", labels, options.clients)]
    network = PflResNet18(int(labels.max()) + 1, options.clients, width=options.width, channels=images.shape[-1])
    network = network.to(get_default_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    local_sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    model = PyTorchModel(network, local_sgd, central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0))
    all_images, all_labels = torch.from_numpy(images), torch.from_numpy(labels)

    def shuffled(client: int) -> PyTorchTensorDataset:
        order = slices[client][torch.randperm(len(slices[client]))]
        return PyTorchTensorDataset(
            (all_images[order], all_labels[order], torch.full_like(order, client)), user_id=client
        )

    clients = FederatedDataset(shuffled, get_user_sampler("minimize_reuse", range(options.clients)))
    backend = SimulatedBackend(clients, clients, postprocessors=[WeightByDatapoints()])
    rounds = NNAlgorithmParams(options.rounds, 1, train_cohort_size=options.clients, val_cohort_size=0)
    train = NNTrainHyperParams(local_batch_size=options.batch, local_num_epochs=1, local_learning_rate=0.05)
    test, seconds = NNEvalHyperParams(local_batch_size=options.batch), Seconds()
    algorithm = FederatedAveraging() if options.evaluate else WithoutEvaluation()
    algorithm.run(rounds, backend, model, train, test, [seconds], send_metrics_to_platform=False)
    return np.diff(seconds.times)


if __name__ == "__main__":
    main()
