"""PGA: projected gradient ascent with the leaving client's help (Halimi et al., 2022, "Federated Unlearning: How to
Efficiently Erase a Client in FL?")."""

from typing import Any

import torch
from flwr.serverapp import Grid

from fedunlearn.build import model_of
from strategies.gradient_ascent import GradientAscent

RANDOM = 1  # where its draws are used, beside the run's own initial weights


class ProjectedAscent(GradientAscent):
    """w <- P(w + eta grad L_i(w)), P onto the ball |w - w_ref| <= delta around w_ref = (N w - n_i w_i) / (N - n_i).

    w_ref is the mean of the other clients' models, which follows from the average w and the leaving client's own local
    model w_i (their Section 3; with examples n_i of N as weights). w_i is trained anew from w, since no node keeps a
    model between rounds. delta is a third of the mean distance between w_ref and ten random models, as theirs. The
    server knows w_ref's ball from that one reply; the clients then recover as after `GradientAscent`.
    """

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Find the reference, ascend within its ball, recover."""
        own = self.ask_to_train("train", grid, leaving, costs, "reference", everybody=True, embeddings=False)
        until = self.foretold_accuracy(leaving)
        n_own = sum(self.federation.examples[c] for c in own.counts)
        share = n_own / sum(self.federation.examples[c] for c in self.active)
        self.server.move({name: -share * by for name, by in self.federation.mean(own).items()})
        radius = self.radius()
        self.ascend(leaving, grid, costs, until=until, radius=radius)
        self.recover(grid, costs)
        return {"until": until, "radius": radius}

    @torch.no_grad()
    def radius(self) -> float:
        """A third of the mean distance of the model from ten random ones."""
        distances = []
        for number in range(10):
            random = dict(model_of(self.config, self.worker.dataset, RANDOM, number).named_parameters())
            squares = [(p - random[n].to(p.device)).square().sum() for n, p in self.model.named_parameters()]
            distances.append(float(torch.stack(squares).sum().sqrt()))
        return sum(distances) / len(distances) / 3
