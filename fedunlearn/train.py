"""Local training of one client, as a function of its arguments alone."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from fedunlearn.evaluate import Counts, count
from fedunlearn.losses import multi_task_loss
from fedunlearn.model import Batch
from fedunlearn.precision import autocast

SCHEDULES = ("steps", "cosine", "constant")


def generator_of(seed: int, *place: int) -> torch.Generator:
    """Random draws that depend on the seed and on where they are used (round, client, ...), and on nothing else."""
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(progress: float, *, lr: float, schedule: str) -> float:
    """The rate after the share `progress` (0..1) of all rounds.

    `steps` divides by 10 at 0.5 and again at 0.75 (the paper: epochs 100 and 150 of 200), `cosine` anneals to 0.
    """
    if schedule == "steps":
        return lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * min(progress, 1))) / 2
    return lr


def loss_weights(progress: float, weights: dict[str, float], *, warmup: float) -> dict[str, float]:
    """The class loss alone for the share `warmup` of training, then all of Eq. 4 (the paper: 20 of 200 epochs)."""
    if progress < warmup:
        return weights | {"client_weight": 0.0, "disentangle_weight": 0.0}
    return weights


def fit(
    model: nn.Module,
    epochs: Iterable[Iterable[Batch]],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    precision: str,
    loss: dict[str, float],
) -> Counts:
    """SGD on `losses.multi_task_loss` over `epochs` of batches, in place, with a fresh optimiser.

    Returns:
        Loss and hits of every example at the moment it was trained on, summed over all epochs.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    model.train()
    return sum((_step(model, optimiser, batch, precision, loss) for epoch in epochs for batch in epoch), Counts())


def _step(model: nn.Module, optimiser: torch.optim.SGD, batch: Batch, precision: str, loss: dict[str, float]) -> Counts:
    images, class_labels, client_ids = batch
    with autocast(images.device, precision):
        outputs = model(images)
    objective = multi_task_loss(*outputs, class_labels, client_ids, **loss)
    optimiser.zero_grad()
    objective.backward()
    optimiser.step()
    return count(outputs, batch, float(objective.detach()) * len(images))
