"""Estimate the predictions of the retrained model on held-out images, without retraining.

The *retrained model* ("gold" in the paper) is the one that never saw the forget clients' images. The estimate looks up,
class by class, an earlier round of the same training, by which the model had seen as many images of the class. It then
corrects for the new frequencies of the classes.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

LEAST = 1e-7
"""Smallest probability that counts: half precision, in which predictions are kept, ends there."""
BOUNDS = math.log(10), 10.0
"""Largest |log T| and largest |b| of a calibration."""


def calibrate(probs: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Calibrate probabilities by a temperature and a bias for each class.

    log p / T + b, with the T and b of the smallest mean -log softmax(log p / T + b)_y (Alexandari et al., 2020,
    "Maximum likelihood with bias-corrected calibration is hard-to-beat at label shift adaptation", Section 3). The
    result is neither overconfident, nor does it favour classes beyond their frequency.

    Args:
        probs: p, of held-out images, [N, K].
        labels: y, int64 [N].

    Returns:
        The logarithms of calibrated probabilities, [N, K] in fp64, and T, how many times overconfident p was (between
        0.1 and 10).

    Example:
        >>> probs = torch.tensor([[0.99, 0.01]] * 4 + [[0.01, 0.99]] * 4)
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])  # the likeliest class is right in 3 of 4 cases, not in 99 %
        >>> logs, t = calibrate(probs, labels)
        >>> round(logs[0].exp()[0].item(), 2), round(t, 1)
        (0.75, 4.2)
    """
    from scipy.optimize import minimize

    logs = probs.double().clamp(min=LEAST).log()

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.tensor(values, requires_grad=True)
        found = cross_entropy(logs / at[0].exp() + at[1:], labels)
        (gradient,) = torch.autograd.grad(found, at)
        return found.item(), gradient.numpy()

    bounds = [(-most, most) for most in (BOUNDS[0], *[BOUNDS[1]] * logs.shape[1])]
    found = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds)
    t, b = math.exp(found.x[0]), torch.from_numpy(found.x[1:])
    return (logs / t + b).log_softmax(1), t


def estimate_retrained(
    predictions: Mapping[int, Tensor], labels: Tensor, counts_before: Tensor, counts_after: Tensor
) -> Tensor:
    """Estimate the predictions of a model that learned from m'_k examples of each class k instead of m_k.

    By round t that model would have seen t m'_k examples of class k. The present one had seen as many by round
    t m'_k / m_k. The estimate for images of class k is the prediction of that round, calibrated (`calibrate`). Fewer
    examples also make a class less likely. Bayes' rule corrects for that: the prior changes from the class frequencies
    of the held-out images to m' (Saerens et al., 2002, "Adjusting the outputs of a classifier to new a priori
    probabilities", Eq. 2.4). In the end the estimate is as confident as the present model.

    Args:
        predictions: by round, probabilities for held-out images, [N, K] each. The last round is the present one. For a
            round that is not among them, the nearest counts.
        labels: of these images, int64 [N].
        counts_before: m, examples of each class, [K].
        counts_after: m', [K], some of them above 0; a class without any is never predicted.

    Returns:
        Probabilities, [N, K].

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.7, 0.3], [0.4, 0.6], [0.1, 0.9], [0.6, 0.4], [0.3, 0.7]])
        >>> labels = torch.tensor([0, 0, 1, 1, 1, 0])
        >>> estimate_retrained({1: probs}, labels, torch.tensor([5, 5]), torch.tensor([5, 0])).argmax(1)
        tensor([0, 0, 0, 0, 0, 0])
    """
    now, rounds = max(predictions), torch.tensor(sorted(predictions))
    as_far = now * counts_after / counts_before.clamp(min=1)
    nearest = rounds[(rounds[:, None] - as_far).abs().argmin(0)]
    logs, t = calibrate(predictions[now], labels)
    for round_ in set(nearest[labels].tolist()) - {now}:
        then = nearest[labels] == round_
        logs[then] = calibrate(predictions[round_], labels)[0][then]
    prior = counts_after / torch.bincount(labels, minlength=len(counts_after)).clamp(min=1)
    return (t * (logs + prior.log())).softmax(1).to(predictions[now])
