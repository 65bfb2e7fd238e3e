"""Selective Synaptic Dampening: shrink what matters more for the forget set than for all (paper, Section 4.2)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.unlearning.pruning import prune_clients


def dampen(
    params: dict[str, Tensor],
    fisher_full: dict[str, Tensor],
    fisher_forget: dict[str, Tensor],
    *,
    alpha: float,
    lambda_: float,
    exponent: float = 1.0,
) -> dict[str, Tensor]:
    """theta_i *= min((lambda F_D,i / F_f,i)^e, 1) where F_f,i > alpha F_D,i (Eq. 8-9; Foster et al., 2024).

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
    """
    _check("fisher_full", fisher_full, params)
    _check("fisher_forget", fisher_forget, params)

    def dampened(name: str, theta: Tensor) -> Tensor:
        full, forget = fisher_full[name], fisher_forget[name]
        beta = (lambda_ * full / forget).pow(exponent).clamp(max=1)
        return torch.where(forget > alpha * full, beta * theta, theta)

    return {name: dampened(name, theta) for name, theta in params.items()}


@torch.no_grad()
def step(
    model: TwoHeadResNet18,
    fisher_full: dict[str, Tensor],
    fisher_forget: dict[str, Tensor],
    clients: Iterable[int],
    *,
    alpha: float,
    lambda_: float,
    exponent: float = 1.0,
) -> None:
    """Dampen the model by both Fishers (`dampening.dampen`), then prune the forgotten clients' neurons, in place."""
    params = dict(model.named_parameters())
    dampened = dampen(params, fisher_full, fisher_forget, alpha=alpha, lambda_=lambda_, exponent=exponent)
    model.load_state_dict(dampened, strict=False)
    prune_clients(model, clients)


def largest_alpha(examples: int, forget_examples: int) -> float:
    """N / n_f: no F_f,i / F_D,i is above it, since F_D contains the forget set's share of F_f; SSD's usual alpha = 10
    therefore selects nothing of a client that owns a tenth of the data."""
    return examples / forget_examples


def selected_share(fisher_full: dict[str, Tensor], fisher_forget: dict[str, Tensor], *, alpha: float) -> float:
    """|S| / number of parameters, with S = {i: F_f,i > alpha F_D,i} (Eq. 8)."""
    selected = sum(int((fisher_forget[name] > alpha * full).sum()) for name, full in fisher_full.items())
    return selected / sum(full.numel() for full in fisher_full.values())


def _check(what: str, fisher: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    if fisher.keys() != params.keys():
        raise ValueError(f"{what} has other names than the parameters: {sorted(fisher.keys() ^ params.keys())[:3]}")
    for name, values in fisher.items():
        if values.shape != params[name].shape:
            raise ValueError(f"{what}[{name!r}] is {list(values.shape)}, the parameter {list(params[name].shape)}")
        if not (torch.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{what}[{name!r}] has negative, NaN or infinite values")
