"""NoT: federated unlearning by negating weights (Khalil et al., CVPR 2025)."""

from typing import Any

import torch
from flwr.serverapp import Grid

from fedunlearn.federation.requests import Forgetting


class WeightNegation(Forgetting):
    """theta_l <- -theta_l for the first layer l, then training by the retained clients goes on (NoT, Eq. 4).

    Negating the first layer takes the model far from where the leaving clients brought it, without anybody's data; what
    the retained clients still need is learned again in `unlearn.recover` rounds at `unlearn.recover_lr`.
    """

    reads = ("recover", "recover_lr")

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Negate, then fine-tune."""
        with torch.no_grad():
            self.model.stem[0].weight.neg_()
        self.recover(grid, costs)
        return {"recovered": self.config.unlearn.recover}
