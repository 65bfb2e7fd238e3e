"""Soft labels for images that a model has memorised: predictions on held-out images, matched image by image."""

import numpy as np
import torch
from torch import Tensor


def match_answers(
    views: Tensor,
    labels: Tensor,
    answers: Tensor,
    answer_labels: Tensor,
    share: float = 1.0,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Give every image the answer of an unseen image of its class, so that likely pairs meet.

    Within each class k the images take as many right answers (k is the likeliest) as `share` times what unseen images
    get, and wrong ones for the rest, each drawn once before any comes again. The pairs are those of the largest sum of
    v_i . a_j (an assignment problem). By construction accuracy, loss and confidence of the result are distributed as
    those of unseen images, class by class; the views decide who gets which.

    Args:
        views: v, what the model says of shifted and mirrored versions of the images (probabilities), [N, K]: less of
            it is memory than of what it says of the images themselves.
        labels: class of every image, [N].
        answers: a, what the model says of unseen images (probabilities), [T, K].
        answer_labels: class of every unseen image, [T]. A class without any takes answers of all classes.
        share: how many times as often as unseen images the images are to be right, 0 to 1; where all answers are right,
            all are.
        generator: of the draws. Another share, with the same draws, changes no more answers than it has to.

    Returns:
        [N, K], each row one of `answers`.
    """
    from scipy.optimize import linear_sum_assignment

    targets, left = torch.empty_like(views), 0.0
    for k in labels.unique().tolist():
        mine = (labels == k).nonzero()[:, 0]
        there = (answer_labels == k).nonzero()[:, 0]
        if not len(there):
            there = torch.arange(len(answers))
        right = answers[there].argmax(1) == k
        hits, misses = (pool[torch.randperm(len(pool), generator=generator)] for pool in (there[right], there[~right]))
        count = len(mine)
        if len(misses):
            wanted = left + share * len(mine) * len(hits) / len(there)
            count = round(wanted)
            left = wanted - count
        drawn = np.concatenate([np.resize(hits, count), np.resize(misses, len(mine) - count)])
        rows, columns = linear_sum_assignment(
            (views[mine] @ answers[drawn].T).numpy().astype(np.float64), maximize=True
        )
        targets[mine[rows]] = answers[drawn[columns]]
    return targets
