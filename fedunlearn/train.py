"""Local training of one client, as a function of its arguments alone."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.evaluate import Counts, count
from fedunlearn.losses import multi_task_loss
from fedunlearn.model import Batch, TwoHeadResNet18
from fedunlearn.null_space import project_gradients
from fedunlearn.precision import at_least_fp32, autocast

SCHEDULES = ("steps", "cosine", "constant")


def generator_of(seed: int, *place: int) -> torch.Generator:
    """Random draws that depend on the seed and on where they are used (round, client, ...) alone.

    Zeros at the end of a place do not count: a client's draws of a round are those of its epoch 0.
    """
    state = np.random.SeedSequence([seed, *place]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def learning_rate(progress: float, *, lr: float, schedule: str, end: float = 0.0) -> float:
    """The rate after the share `progress` (0..1) of all rounds.

    `steps` divides by 10 at 0.5 and again at 0.75 (the paper: epochs 100 and 150 of 200), `cosine` anneals to the share
    `end` of `lr`.
    """
    if schedule == "steps":
        return lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        return lr * (end + (1 - end) * (1 + math.cos(math.pi * min(progress, 1))) / 2)
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
    frozen: Iterable[nn.Parameter] = (),
) -> Counts:
    """SGD on `losses.multi_task_loss` over `epochs` of batches, in place, with a fresh optimiser.

    Args:
        frozen: parameters that stay as they are.

    Returns:
        Loss and hits of every example at the moment it was trained on, summed over all epochs.
    """
    kept = {id(parameter) for parameter in frozen}
    moving = [parameter for parameter in model.parameters() if id(parameter) not in kept]
    optimiser = torch.optim.SGD(moving, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    model.train()
    total = Counts()
    for batch in (batch for epoch in epochs for batch in epoch):
        with autocast(batch[0].device, precision):
            outputs = model(batch[0])
        objective = multi_task_loss(*outputs, *batch[1:], **loss)
        model.zero_grad()
        objective.backward()
        optimiser.step()
        total += count(outputs, batch, float(objective.detach()) * len(batch[0]))
    return total


def teach(
    model: TwoHeadResNet18,
    epochs: Iterable[Iterable[tuple[Tensor, Tensor]]],
    *,
    lr: float,
    momentum: float,
    precision: str,
    projectors: dict[str, Tensor],
) -> None:
    """SGD on -sum_k t_k log p_k over batches of images [N, ...] and wanted class probabilities t [N, K], in place.

    Layers move along `projectors` alone (`null_space.project_gradients`), all others not at all; BatchNorm normalises
    with its running statistics, as when the model answers, and these do not move.
    """
    optimiser = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    model.eval()
    for images, wanted in (batch for epoch in epochs for batch in epoch):
        with autocast(images.device, precision):
            outputs = model(images)
        model.zero_grad()
        cross_entropy(at_least_fp32(outputs.class_logits), wanted).backward()
        project_gradients(model, projectors)
        optimiser.step()


def ascend(
    model: nn.Module,
    epochs: Iterable[Iterable[Batch]],
    *,
    lr: float,
    clip: float,
    radius: float,
    precision: str,
    finished: Callable[[], bool],
) -> Counts:
    """theta <- P(theta + lr g), g the gradient of the class loss clipped to norm `clip`, P the projection onto
    |theta - theta_0| <= radius, in place; until `finished()`, which is asked after every fourth of an epoch.

    Returns:
        Loss and hits of every example at the moment before its step, summed over all steps.
    """
    start = [p.detach().clone() for p in model.parameters()]
    total = Counts()
    for epoch in epochs:
        steps = list(epoch)
        asks = {round(len(steps) * quarter / 4) for quarter in (1, 2, 3, 4)}
        for number, batch in enumerate(steps, 1):
            model.train()
            with autocast(batch[0].device, precision):
                outputs = model(batch[0])
            loss = cross_entropy(at_least_fp32(outputs.class_logits), batch[1])
            _climb(list(model.parameters()), loss, lr=lr, clip=clip)
            _project(list(model.parameters()), start, radius)
            total += count(outputs, batch, float(loss.detach()) * len(batch[0]))
            if number in asks and finished():
                return total
    return total


def _climb(params: list[Tensor], loss: Tensor, *, lr: float, clip: float) -> None:
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    reached = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    norm = torch.stack([g.square().sum() for _, g in reached]).sum().sqrt()
    with torch.no_grad():
        for p, g in reached:
            p.add_(g, alpha=lr * min(1.0, clip / max(float(norm), 1e-12)))


@torch.no_grad()
def _project(params: list[Tensor], centre: list[Tensor], radius: float) -> None:
    """Move the parameters to the nearest place within `radius` of `centre`."""
    away = torch.stack([(p - c).square().sum() for p, c in zip(params, centre, strict=True)]).sum().sqrt()
    if away > radius:
        for p, c in zip(params, centre, strict=True):
            p.copy_(c + (p - c) * (radius / away))
