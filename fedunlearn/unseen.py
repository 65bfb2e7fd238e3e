"""What a model would say of a leaving client's images had it never seen them: what it said of unseen images when it had
seen as many of their class (`foretold`), image by image (`match_answers`)."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LEAST = 1e-7  # probability that counts: half precision, in which answers are kept, ends there
BOUNDS = math.log(10), 10.0  # of |log T| and of every |b|


def calibrated(probs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """log p / T + b of the smallest mean -log softmax(log p / T + b)_y: what p says once it is neither too sure nor
    answers some classes too often (Alexandari et al., 2020, "Maximum likelihood with bias-corrected calibration is
    hard-to-beat at label shift adaptation", Section 3).

    Args:
        probs: p, of unseen images, [N, K].
        labels: y, [N].

    Returns:
        The logarithms of calibrated probabilities, [N, K] in fp64, and T, how many times too sure p was (between 0.1
        and 10).
    """
    from scipy.optimize import minimize

    logs = probs.double().clamp(min=LEAST).log()

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(values, requires_grad=True)
        found = cross_entropy(logs / at[0].exp() + at[1:], labels)
        found.backward()
        return found.item(), at.grad.numpy()

    bounds = [(-most, most) for most in (BOUNDS[0], *[BOUNDS[1]] * logs.shape[1])]
    found = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds)
    t, b = math.exp(found.x[0]), torch.from_numpy(found.x[1:])
    return (logs / t + b).log_softmax(1), t


def foretold(said: dict[int, Tensor], labels: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """What the model would say now of unseen images had it learned from m'_k examples of class k instead of m_k.

    By round t it would have seen t m'_k examples of class k. It had seen as many by round t m'_k / m_k: of images of
    that class it says what it said then, `calibrated`. Fewer examples also make a class an answer less likely, by
    Bayes' rule for a posterior of which the prior alone changes, from that of the unseen images to m' (Saerens et al.,
    2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Eq. 2.4). In the end it is as sure as
    the model is now.

    Args:
        said: by round what was said of unseen images (probabilities, [N, K]), the last of them now; of a round that is
            not among them, the nearest is taken.
        labels: of these images, [N].
        before: m, examples a class, [K].
        after: m', [K], some of them above 0; a class without any is never the answer.

    Returns:
        Probabilities, [N, K].
    """
    now, rounds = max(said), torch.tensor(sorted(said))
    as_far = now * after / before.clamp(min=1)
    nearest = rounds[(rounds[:, None] - as_far).abs().argmin(0)]
    logs, t = calibrated(said[now], labels)
    for round_ in set(nearest[labels].tolist()) - {now}:
        then = nearest[labels] == round_
        logs[then] = calibrated(said[round_], labels)[0][then]
    prior = after / torch.bincount(labels, minlength=len(after)).clamp(min=1)
    return (t * (logs + prior.log())).softmax(1).to(said[now])


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
