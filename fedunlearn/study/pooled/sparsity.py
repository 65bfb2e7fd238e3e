"""Pruning instead of dampening: DeepClean, lottery-ticket style, retain-sensitive (paper, Section 6 and Table 18)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedunlearn.nn.model import HEADS

METHODS = ("lottery ticket", "retain-sensitive", "DeepClean")


def most_sensitive(of: Mapping[str, Tensor], against: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """Mark the fraction of the backbone's weights with the largest ratio of two Fishers: 1 there, 0 elsewhere, by name.

    Forget-sensitive weights have the largest F_Df / F_Dr, retain-sensitive ones the largest F_Dr / F_Df. Weights that
    matter to neither come last. Of equal ratios at the edge, the first are taken.
    """
    names = [name for name in of if not name.startswith(HEADS)]
    ratios = torch.cat([(of[name] / against[name]).nan_to_num(nan=-1.0, posinf=torch.inf).flatten() for name in names])
    chosen = torch.zeros_like(ratios)
    chosen[ratios.argsort(descending=True, stable=True)[: round(fraction * len(ratios))]] = 1
    parts = chosen.split([of[name].numel() for name in names])
    masks = {name: part.view_as(of[name]) for name, part in zip(names, parts, strict=True)}
    return {name: masks.get(name, torch.zeros_like(values)) for name, values in of.items()}


@torch.no_grad()
def prune_weights(
    method: str,
    params: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    forget_sensitive: Mapping[str, Tensor],
    retain_sensitive: Mapping[str, Tensor],
    *,
    heads: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prune a model's weights, and choose which of them to fine-tune on the retain set.

    `DeepClean` (Shi et al., 2024): forget-sensitive weights become zero and are the ones to tune. `retain-sensitive`:
    the same weights become zero and stay so; the retain-sensitive ones are tuned. `lottery ticket` (after Frankle and
    Carbin, 2019): as before, but the retain-sensitive ones first get their initial values again. A weight that is both
    is pruned.

    Args:
        params, initial: weights now and before training, by name.
        forget_sensitive, retain_sensitive: what `most_sensitive` marked.
        heads: tune everything beside the backbone too.

    Returns:
        New weights and masks (0 or 1), both with the names of `params`.
    """
    pruned = {name: theta * (1 - forget_sensitive[name]) for name, theta in params.items()}
    if method == "DeepClean":
        tuned = dict(forget_sensitive)
    else:
        tuned = {name: mask * (1 - forget_sensitive[name]) for name, mask in retain_sensitive.items()}
    if method == "lottery ticket":
        pruned = {name: torch.where(tuned[name] > 0, initial[name], theta) for name, theta in pruned.items()}
    if heads:
        tuned = {name: torch.ones_like(mask) if name.startswith(HEADS) else mask for name, mask in tuned.items()}
    return pruned, tuned
