"""Updates that point the wrong way: their opposites would predict their own clients' classes better.

Honest clients with different classes send updates that differ in length and in direction, and each alone makes a model
worse for the classes of the others. For the classes of its own client it makes it better than its opposite would. So
held-out images are weighed by the client's classes.
"""

from math import sqrt

import torch
from torch import Tensor

from fedunlearn.federation.replies import AstrayError
from fedunlearn.runs.uncertainty import Estimate

IMAGES = 128  # of the server's, on which an update and its opposite are looked at
MOST = 0.02  # by which the opposite may be better: updates that hardly change anything point anywhere
MOST_ERRORS = 3.0  # standard errors by which it may be better


def check_direction(probs: Tensor, of_opposite: Tensor, labels: Tensor, class_counts: Tensor) -> None:
    """Refuse an update whose opposite is clearly the better one for its client.

    Args:
        probs: probabilities of the right classes of held-out images after the update, [N].
        of_opposite: after the opposite of the update, [N].
        labels: of the images, [N].
        class_counts: of the client's images, [K].

    Raises:
        AstrayError: it is.

    Example:
        >>> labels, counts = torch.tensor([0, 0, 1]), torch.tensor([5, 0])
        >>> check_direction(torch.tensor([0.9, 0.8, 0.0]), torch.tensor([0.4, 0.5, 1.0]), labels, counts)
    """
    lost = lost_by(probs, of_opposite, labels, class_counts)
    if lost.value > max(MOST, MOST_ERRORS * lost.error):
        raise AstrayError("its update points the wrong way: the opposite predicts its client's classes better (robust)")


def lost_by(probs: Tensor, of_opposite: Tensor, labels: Tensor, class_counts: Tensor) -> Estimate:
    """Estimate how much likelier the opposite makes the right class of images of the client's classes."""
    held_out = torch.bincount(labels, minlength=len(class_counts))
    weights = (class_counts.double() / held_out.clamp_min(1))[labels]
    weights = weights / weights.sum()
    differences = of_opposite.double() - probs.double()
    mean = (weights * differences).sum()
    return Estimate(float(mean), sqrt(float((weights * (differences - mean)).square().sum())))
