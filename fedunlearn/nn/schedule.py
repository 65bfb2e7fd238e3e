"""Change the learning rate and the weights of the losses over training."""

import math
from collections.abc import Mapping

SCHEDULES = ("steps", "cosine", "constant")


def learning_rate(progress: float, *, lr: float, schedule: str, end: float = 0.0) -> float:
    """Compute the learning rate after a fraction of all rounds.

    `steps` divides it by 10 at 0.5 and again at 0.75 (the paper: epochs 100 and 150 of 200). `cosine` anneals it from
    `lr` to the fraction `end` of `lr`. `constant` keeps it.

    Args:
        progress: fraction of all rounds that are done, 0..1.
        lr: learning rate at the beginning.
        schedule: one of `SCHEDULES`.
        end: fraction of `lr` that `cosine` ends with, 0..1.

    Example:
        >>> [learning_rate(progress, lr=2.0, schedule="cosine") for progress in (0, 0.5, 1)]
        [2.0, 1.0, 0.0]
    """
    if schedule == "steps":
        return lr * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    if schedule == "cosine":
        return lr * (end + (1 - end) * (1 + math.cos(math.pi * min(progress, 1))) / 2)
    return lr


def loss_weights(progress: float, weights: Mapping[str, float], *, warmup: float) -> dict[str, float]:
    """Keep the class loss alone during warm-up, and all of Eq. 4 afterwards (the paper: 20 of 200 epochs).

    Args:
        progress: fraction of training that is done, 0..1.
        weights: keywords of `losses.multi_task_loss`.
        warmup: fraction of training that the warm-up takes, 0..1.

    Returns:
        A new dict.

    Example:
        >>> loss_weights(0.0, {"client_weight": 1.0}, warmup=0.1)
        {'client_weight': 0.0, 'disentangle_weight': 0.0}
        >>> loss_weights(0.1, {"client_weight": 1.0}, warmup=0.1)
        {'client_weight': 1.0}
    """
    if progress < warmup:
        return {**weights, "client_weight": 0.0, "disentangle_weight": 0.0}
    return dict(weights)
