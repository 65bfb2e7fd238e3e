"""Make soft labels for images that a model has memorised, from predictions on held-out images."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from torch import Tensor

from fedunlearn.nn.augment import shifted

SHIFTS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Down and right, in sixteenths of an image's height."""


def augmented_views(images: Tensor, *, mirror: bool) -> Iterator[Tensor]:
    """Shift images up, down, left and right by a sixteenth of their height, and mirror them or not.

    A model's predictions on these views depend less on what it memorised than those on the images themselves.

    Args:
        images: uint8 [N, H, W, channels], on the CPU. Rows of a table, fp32, have no other views than themselves.
        mirror: whether every shifted view also comes mirrored.

    Yields:
        4 views of the images, or 8 with mirrored ones, each uint8 [N, H, W, channels].

    Example:
        >>> images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        >>> [len([*augmented_views(images, mirror=mirror)]) for mirror in (False, True)]
        [4, 8]
    """
    if images.dtype != torch.uint8:
        yield images
        return
    by = max(1, images.shape[1] // 16)
    for (down, right), mirrored in product(SHIFTS, (0, 1) if mirror else (0,)):
        yield shifted(images, by * down, by * right, mirrored)


def assign_soft_labels(
    views: Tensor,
    labels: Tensor,
    predictions: Tensor,
    prediction_labels: Tensor,
    correct_fraction: float = 1.0,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Assign every image the prediction on a held-out image of its class, so that similar pairs meet.

    Within each class k the images take correct predictions (k is the likeliest) and wrong ones. The fraction of correct
    ones is `correct_fraction` times that on held-out images. Every prediction is drawn once before any comes again. The
    pairs are those with the largest sum of v_i . a_j (an assignment problem). With a `correct_fraction` of 1, accuracy,
    loss and confidence of the soft labels are distributed as on held-out images, class by class. The views decide which
    image takes which.

    Args:
        views: v, mean predictions on `augmented_views` of the images (probabilities), [N, K].
        labels: class of every image, int64 [N].
        predictions: a, on held-out images (probabilities), [T, K].
        prediction_labels: class of every held-out image, int64 [T]. Images of a class without any take predictions of
            all classes.
        correct_fraction: target fraction of correct soft labels, relative to that of held-out images, 0..1. Where all
            predictions of a class are correct, all its soft labels are.
        generator: of the draws. Another fraction, with the same draws, changes no more soft labels than it has to.

    Returns:
        [N, K], each row one of `predictions`.

    Example:
        >>> views, predictions = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.3, 0.7], [0.6, 0.4]])
        >>> labels = torch.tensor([0, 0])
        >>> assign_soft_labels(views, labels, predictions, labels, generator=torch.Generator())
        tensor([[0.6000, 0.4000],
                [0.3000, 0.7000]])
    """
    from scipy.optimize import linear_sum_assignment

    targets, carried = torch.empty_like(views), 0.0
    for k in labels.unique().tolist():
        own = (labels == k).nonzero()[:, 0]
        candidates = (prediction_labels == k).nonzero()[:, 0]
        if not len(candidates):
            candidates = torch.arange(len(predictions))
        correct = predictions[candidates].argmax(1) == k
        hits, misses = (
            pool[torch.randperm(len(pool), generator=generator)] for pool in (candidates[correct], candidates[~correct])
        )
        count = len(own)
        if len(misses):
            wanted = carried + correct_fraction * len(own) * len(hits) / len(candidates)
            count = round(wanted)
            carried = wanted - count  # so that roundings of classes do not add up
        drawn = np.concatenate([np.resize(hits, count), np.resize(misses, len(own) - count)])
        rows, columns = linear_sum_assignment(
            (views[own] @ predictions[drawn].T).numpy().astype(np.float64), maximize=True
        )
        targets[own[rows]] = predictions[drawn[columns]]
    return targets
