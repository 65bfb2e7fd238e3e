"""PGA: projected gradient ascent with the forget client's help (Halimi et al., 2022, "Federated Unlearning: How to
Efficiently Erase a Client in FL?", Section 3)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedunlearn.federation import tasks
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.messages import Tensors
from strategies.ascent import GradientAscent

RANDOM = 1  # the place of random draws of untrained models, beside the run's own initial weights


class ProjectedAscent(GradientAscent):
    """w <- P(w + eta grad L_i(w)), P onto the ball |w - w_ref| <= delta around w_ref = (N w - n_i w_i) / (N - n_i).

    w_ref is the mean of the other clients' models. It follows from the average w and the forget client's own model w_i
    (their Section 3; with examples n_i of N as weights). w_i is trained anew from w, since no node keeps a model
    between rounds. delta is a third of the mean distance between w_ref and ten random models, as theirs. The retain
    clients then repair as after `GradientAscent`.
    """

    label, colour, marker = "PGA", "#e09f3e", "D"

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Find the reference, climb within its ball, repair."""
        own = federation.run(tasks.train, on=forget, embeddings=False)
        until = self.aims(federation, forget)
        examples = federation.examples(own.counts)
        fraction = examples / federation.examples(federation.retain)
        federation.apply(opposite(own.mean(), fraction, federation.state.params))
        radius = distance_of_random_models(federation) / 3
        federation.apply(federation.run(self.climb, on=forget, until=until, radius=radius).mean())
        self.repair(federation)
        return {"until": until, "radius": radius}


def opposite(update: Tensors, fraction: float, params: Mapping[str, Tensor]) -> Tensors:
    """Give -fraction times an update, with which no running variance falls below zero.

    Args:
        update: of one client.
        params: that it is an update of.

    Example:
        >>> opposite({"running_var": torch.tensor([9.0])}, 0.5, {"running_var": torch.tensor([2.0])})
        {'running_var': tensor([-2.])}
    """
    away = {name: -fraction * by for name, by in update.items()}
    variances = {name: by for name, by in away.items() if name.endswith("running_var")}
    return away | {name: torch.maximum(by, -params[name].to(by.device)) for name, by in variances.items()}


@torch.no_grad()
def distance_of_random_models(federation: Federation) -> float:
    """Give the mean distance of the present model's parameters from those of ten untrained models."""
    distances = []
    for number in range(10):
        random = dict(federation.server.new_model(RANDOM, number).named_parameters())
        params = {name: federation.state.params[name] for name in random}
        squares = [(p - random[name].to(p.device)).square().sum() for name, p in params.items()]
        distances.append(float(torch.stack(squares).sum().sqrt()))
    return sum(distances) / len(distances)
