"""What a model would say of a leaving client's images had it never seen them: what the present one says of unseen
images, less sure of the client's classes (`under_prior`), image by image (`match_answers`)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss


def temperature(probs: Tensor, labels: Tensor) -> float:
    """T of the smallest mean -log softmax(log p / T)_y: how many times too sure a model is of unseen images (Guo et
    al., 2017, "On Calibration of Modern Neural Networks", Section 4.2).

    Args:
        probs: p, [N, K].
        labels: y, [N].

    Returns:
        Between 0.1 and 10; above 1 for a model that is too sure.
    """
    from scipy.optimize import minimize_scalar

    logs = _log(probs)
    found = minimize_scalar(
        lambda t: float(nll_loss((logs / np.exp(t)).log_softmax(1), labels)), bounds=np.log((0.1, 10)), method="bounded"
    )
    return float(np.exp(found.x))


def under_prior(probs: Tensor, labels: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """q_k ~ p_k (m'_k / m_k)^T: what the model would say had it learned from m'_k examples of class k instead of m_k.

    That is Bayes' rule for a posterior of which the class prior alone changes (Saerens et al., 2002, "Adjusting the
    Outputs of a Classifier to New a Priori Probabilities", Eq. 2.4), taken where the model is calibrated, at p^(1/T),
    and brought back: the other model is as much too sure. A class of which no example is left is never the answer.

    Args:
        probs: p, of unseen images, [N, K].
        labels: of these, [N]; T is their `temperature`.
        before: m, examples a class, [K].
        after: m', [K], some of them above 0.

    Returns:
        q, [N, K].
    """
    shift = temperature(probs, labels) * (after / before.clamp(min=1)).log()
    return (_log(probs) + shift.to(probs)).softmax(1)


def _log(probs: Tensor) -> Tensor:
    return probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


def less_right(probs: Tensor, labels: Tensor, share: float) -> Tensor:
    """Which answers to keep, so that of every class the share of right ones is `share` times what it is.

    Right ones are left out, evenly along their order. A class with no wrong answer keeps all of them.

    Args:
        probs: of unseen images, [N, K].
        labels: of these, [N].
        share: from 1 on, everything is kept.

    Returns:
        Their positions, in order.
    """
    right, keep = probs.argmax(1) == labels, torch.ones(len(labels), dtype=torch.bool)
    for k in labels.unique().tolist() if share < 1 else ():
        hits, misses = (right & (labels == k)).nonzero()[:, 0], int((~right & (labels == k)).sum())
        wanted = max(share, 0.0) * len(hits) / (len(hits) + misses)
        few = round(wanted / (1 - wanted) * misses) if misses else len(hits)
        keep[hits] = False
        keep[hits[torch.linspace(0, len(hits) - 1, few).round().long()]] = True
    return keep.nonzero()[:, 0]


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
