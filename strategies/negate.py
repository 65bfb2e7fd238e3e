"""NoT: federated unlearning by negating weights (Khalil et al., CVPR 2025)."""

from typing import Any

import torch
from pydantic import Field

from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.strategy import Strategy


class WeightNegation(Strategy):
    """theta_l <- -theta_l for the first layer l, then training goes on with the retain clients (NoT, Eq. 4).

    Negating the first layer takes the model far from where the forget clients brought it, without anybody's data. What
    the retain clients still need is learned again in `repair_rounds` rounds.
    """

    label, colour, marker = "NoT", "#bc4b8a", "<"

    class Settings(CheckedSettings):
        """Settings of NoT."""

        repair_rounds: int = Field(
            default=3, ge=0, le=10**6, description="of the retain clients, until the request is applied"
        )
        repair_lr: float = Field(default=0.01, ge=0, le=100, description="learning rate of these rounds")

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Negate, then repair."""
        with federation.editing() as model, torch.no_grad():
            model.first_weights().neg_()
        federation.train(on=federation.retain, rounds=self.settings.repair_rounds, lr=self.settings.repair_lr)
        return {"repaired": self.settings.repair_rounds}
