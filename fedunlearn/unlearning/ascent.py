"""Gradient ascent on the class loss, within a ball where one is given."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.nn.evaluate import Counts, count
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import at_least_fp32, autocast


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
    norm = float(torch.stack([g.square().sum() for _, g in reached]).sum().sqrt())
    with torch.no_grad():
        for p, g in reached:
            p.add_(g, alpha=lr * min(1.0, clip / max(norm, 1e-12)))


@torch.no_grad()
def _project(params: list[Tensor], centre: list[Tensor], radius: float) -> None:
    """Move the parameters to the nearest place within `radius` of `centre`."""
    away = torch.stack([(p - c).square().sum() for p, c in zip(params, centre, strict=True)]).sum().sqrt()
    if away > radius:
        for p, c in zip(params, centre, strict=True):
            p.copy_(c + (p - c) * (radius / away))
