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
