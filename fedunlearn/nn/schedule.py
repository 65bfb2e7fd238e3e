"""How the learning rate and the weights of the losses change over training."""

import math

SCHEDULES = ("steps", "cosine", "constant")


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
