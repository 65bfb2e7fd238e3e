"""Dampen the weights that matter more for the forget set than for all data (paper, Section 4.2)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.unlearning.pruning import prune_clients

ROUNDING = 1e-5
"""Relative to alpha: more than products in single precision are off."""


def dampen(
    params: Mapping[str, Tensor],
    fisher_full: Mapping[str, Tensor],
    fisher_forget: Mapping[str, Tensor],
    *,
    alpha: float,
    lambda_: float,
    exponent: float = 1.0,
) -> dict[str, Tensor]:
    """Shrink the parameters that matter more for the forget set than for all data.

    Selective Synaptic Dampening: theta_i *= min((lambda F_D,i / F_f,i)^e, 1) where F_f,i > alpha F_D,i (paper,
    Eq. 8-9; Foster et al., 2024, "Fast machine unlearning without retraining through selective synaptic dampening").

    Args:
        params: theta, by name.
        fisher_full: F_D, diagonal Fisher over all data; names and shapes of `params`.
        fisher_forget: F_f, diagonal Fisher over the forget set; names and shapes of `params`.
        alpha: selection threshold; `inf` selects nothing.
        lambda_: dampening strength; 0 sets the selected weights to zero.
        exponent: e, power of the factor (1 in the paper).

    Returns:
        A new dict; the arguments are unchanged.

    Raises:
        ValueError: Fishers of other names or shapes than the parameters, or with negative, NaN or infinite values.

    Example:
        >>> theta = {"w": torch.tensor([2.0, 2.0])}
        >>> full, forget = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 1.0])}
        >>> dampen(theta, full, forget, alpha=3, lambda_=2)
        {'w': tensor([1., 2.])}
    """
    _check("fisher_full", fisher_full, params)
    _check("fisher_forget", fisher_forget, params)

    def dampened(name: str, theta: Tensor) -> Tensor:
        full, forget = fisher_full[name], fisher_forget[name]
        beta = (lambda_ * full / forget).pow(exponent).clamp(max=1)
        return torch.where(forget > alpha * full, beta * theta, theta)

    return {name: dampened(name, theta) for name, theta in params.items()}


@torch.no_grad()
def dampen_and_prune(
    model: TwoHeadModel,
    fisher_full: Mapping[str, Tensor],
    fisher_forget: Mapping[str, Tensor],
    clients: Iterable[int],
    *,
    alpha: float,
    lambda_: float,
    exponent: float = 1.0,
) -> None:
    """Dampen a model by both Fishers, then prune the forget clients' neurons, in place (paper, Algorithm 1).

    Args:
        model: whose parameters change.
        fisher_full, fisher_forget, alpha, lambda_, exponent: of `dampen`.
        clients: the forget clients.

    Raises:
        ValueError: as of `dampen` and of `pruning.pruned`.
    """
    params = dict(model.named_parameters())
    dampened = dampen(params, fisher_full, fisher_forget, alpha=alpha, lambda_=lambda_, exponent=exponent)
    model.load_state_dict(dampened, strict=False)
    prune_clients(model, clients)


def strongest_alpha(
    params: Mapping[str, Tensor],
    fisher_full: Mapping[str, Tensor],
    fisher_forget: Mapping[str, Tensor],
    *,
    budget: float,
    lambda_: float = 1.0,
) -> float:
    """Compute the smallest alpha, and so the strongest dampening, that costs all data no more than a budget.

    The cost is that of `dampening_cost`: 1/2 sum_i F_D,i (theta'_i - theta_i)^2 <= epsilon (paper, Eq. 18). Weights are
    selected in the order of F_f,i / F_D,i, as is optimal for Eq. 17-18 (paper, Section 4.3), until the next does not
    fit. Alpha is then that one's ratio, and a little more, so that no rounding selects it.

    Args:
        params, fisher_full, fisher_forget, lambda_: of `dampen`.
        budget: epsilon, in nats an example.

    Returns:
        Alpha, at least lambda, below which no factor is under 1. A budget of 0 selects nothing that costs anything.

    Raises:
        ValueError: as of `dampen`.

    Example:
        >>> theta = {"w": torch.tensor([2.0, 2.0, 2.0])}
        >>> full, forget = {"w": torch.ones(3)}, {"w": torch.tensor([4.0, 3.0, 2.0])}
        >>> round(strongest_alpha(theta, full, forget, budget=1.2), 3)  # the first costs 9/8, the second 8/9 more
        3.0
    """
    _check("fisher_full", fisher_full, params)
    _check("fisher_forget", fisher_forget, params)
    theta, full, forget = (
        torch.cat([values[name].detach().flatten().double() for name in params])
        for values in (params, fisher_full, fisher_forget)
    )
    ratio = (forget / full).nan_to_num(nan=0.0)
    beta = (lambda_ / ratio).clamp(max=1)
    ratio, order = ratio.sort(descending=True)
    spent = (full * ((1 - beta) * theta).square() / 2)[order].cumsum(0)
    beyond = (spent > budget).nonzero()
    return max(lambda_, float(ratio[beyond[0]]) * (1 + ROUNDING)) if len(beyond) else lambda_


def dampening_cost(params: Mapping[str, Tensor], dampened: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> float:
    """Compute 1/2 sum_i F_i (theta'_i - theta_i)^2, by which a loss grows to second order (paper, Eq. 16 and 18).

    Args:
        params, dampened: theta and theta', by name.
        fisher: F, diagonal, by name.

    Returns:
        Nats an example.

    Example:
        >>> theta, less = {"w": torch.tensor([2.0])}, {"w": torch.tensor([1.0])}
        >>> dampening_cost(theta, less, {"w": torch.tensor([3.0])})
        1.5
    """
    return sum(float((f.double() * (dampened[n] - params[n]).square()).sum()) / 2 for n, f in fisher.items())


def largest_alpha(examples: int, forget_examples: int) -> float:
    """Compute the largest ratio F_f,i / F_D,i that a parameter can have, N / n_f, and a little more for rounding.

    F_D is a mean over all N examples, n_f of which are the forget set, so that F_D >= F_f n_f / N. SSD's usual
    alpha = 10 therefore selects nothing for a client that owns a tenth of the data. A parameter that no other client's
    images reach has just this ratio.

    Args:
        examples: N.
        forget_examples: n_f.

    Example:
        >>> round(largest_alpha(100, 10), 3)
        10.0
    """
    return examples / forget_examples * (1 + ROUNDING)


def selected_fraction(fisher_full: Mapping[str, Tensor], fisher_forget: Mapping[str, Tensor], *, alpha: float) -> float:
    """Compute the fraction of parameters that `dampen` selects: those with F_f,i > alpha F_D,i (paper, Eq. 8).

    Args:
        fisher_full, fisher_forget, alpha: of `dampen`.

    Returns:
        0..1.

    Example:
        >>> selected_fraction({"w": torch.ones(4)}, {"w": torch.tensor([0.5, 1.5, 2.5, 3.5])}, alpha=2)
        0.5
    """
    selected = sum(int((fisher_forget[name] > alpha * full).sum()) for name, full in fisher_full.items())
    return selected / sum(full.numel() for full in fisher_full.values())


def _check(what: str, fisher: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    if fisher.keys() != params.keys():
        raise ValueError(f"{what} has other names than the parameters: {sorted(fisher.keys() ^ params.keys())[:3]}")
    for name, values in fisher.items():
        if values.shape != params[name].shape:
            raise ValueError(f"{what}[{name!r}] is {list(values.shape)}, the parameter {list(params[name].shape)}")
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{what}[{name!r}] has negative, NaN or infinite values")
