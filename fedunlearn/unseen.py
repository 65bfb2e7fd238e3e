"""What the model would say of a leaving client's images had it never seen them: answers to unseen images, matched."""

import numpy as np
import torch
from torch import Tensor


def match_answers(
    views: Tensor, labels: Tensor, answers: Tensor, answer_labels: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Give every image the answer of an unseen image of its class, so that likely pairs meet.

    Within each class k the images take as many answers as they are, drawn from those of class k (each once before any
    comes again), and the pairs are those of the largest sum of v_i . a_j (an assignment problem). By construction
    accuracy, loss and confidence of the result are distributed as those of unseen images, class by class; the views
    decide who gets which.

    Args:
        views: v, what the model says of shifted and mirrored versions of the images (probabilities), [N, K]: less of
            it is memory than of what it says of the images themselves.
        labels: class of every image, [N].
        answers: a, what the model says of unseen images (probabilities), [T, K].
        answer_labels: class of every unseen image, [T]. A class without any takes answers of all classes.

    Returns:
        [N, K], each row one of `answers`.
    """
    from scipy.optimize import linear_sum_assignment

    targets = torch.empty_like(views)
    for k in labels.unique().tolist():
        mine = (labels == k).nonzero()[:, 0]
        there = (answer_labels == k).nonzero()[:, 0]
        if not len(there):
            there = torch.arange(len(answers))
        passes = -(-len(mine) // len(there))
        drawn = torch.cat([there[torch.randperm(len(there), generator=generator)] for _ in range(passes)])[: len(mine)]
        rows, columns = linear_sum_assignment(
            (views[mine] @ answers[drawn].T).numpy().astype(np.float64), maximize=True
        )
        targets[mine[rows]] = answers[drawn[columns]]
    return targets
