"""Climb the class loss by gradient ascent, within a ball where one is given."""

from collections.abc import Callable, Iterable, Sequence

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
    examples: int,
    lr: float,
    clip: float,
    radius: float,
    precision: str,
    finished: Callable[[], bool],
) -> Counts:
    """Climb the class loss by clipped and projected gradient steps, in place, until `finished()`.

    theta <- P(theta + lr g). g is the gradient of the class loss, clipped to norm `clip`. P projects onto the ball
    |theta - theta_0| <= radius around the parameters at the beginning (Halimi et al., 2022, "Federated unlearning: how
    to efficiently erase a client in FL?").

    Args:
        model: gives `nn.model.Outputs`.
        epochs: of batches on the model's device.
        examples: of an epoch.
        lr: learning rate.
        clip: largest norm of a gradient.
        radius: of the ball; `inf` for none.
        precision: of forward passes (`nn.precision`).
        finished: is called after every fourth of an epoch's examples.

    Returns:
        Loss and hits of every example at the moment before its step, summed over all steps.

    Example:
        >>> from fedunlearn.nn.model import TwoHeadResNet18
        >>> batch = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.int64)
        >>> steps = {"examples": 4, "lr": 0.1, "clip": 1.0, "radius": 0.5, "precision": "fp32"}
        >>> ascend(TwoHeadResNet18(2, 0, width=8), [[batch]] * 9, **steps, finished=lambda: True).examples
        4
    """
    start = [p.detach().clone() for p in model.parameters()]
    total = Counts()
    for epoch in epochs:
        seen = 0
        for batch in epoch:
            model.train()
            with autocast(batch[0].device, precision):
                outputs = model(batch[0])
            loss = cross_entropy(at_least_fp32(outputs.class_logits), batch[1])
            _climb(list(model.parameters()), loss, lr=lr, clip=clip)
            _project(list(model.parameters()), start, radius)
            total += count(outputs, batch, float(loss.detach()) * len(batch[0]))
            before, seen = seen, seen + len(batch[0])
            if 4 * seen // examples > 4 * before // examples and finished():
                return total
    return total


def _climb(params: Sequence[Tensor], loss: Tensor, *, lr: float, clip: float) -> None:
    params = [p for p in params if p.requires_grad]
    gradients = torch.autograd.grad(loss, params, allow_unused=True)
    reached = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    norm = float(torch.stack([g.square().sum() for _, g in reached]).sum().sqrt())
    with torch.no_grad():
        for p, g in reached:
            p.add_(g, alpha=lr * min(1.0, clip / max(norm, 1e-12)))


@torch.no_grad()
def _project(params: Sequence[Tensor], centre: Sequence[Tensor], radius: float) -> None:
    """Move the parameters to the nearest point within `radius` of `centre`."""
    distance = torch.stack([(p - c).square().sum() for p, c in zip(params, centre, strict=True)]).sum().sqrt()
    if distance > radius:
        for p, c in zip(params, centre, strict=True):
            p.copy_(c + (p - c) * (radius / distance))
