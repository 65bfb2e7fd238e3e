"""Gradient ascent on the forget clients' loss (Wu et al., 2022, "Federated Unlearning: Guarantee the Right of Clients
to Forget", Section 3)."""

import math
from typing import Any

from pydantic import Field

from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.federation.client import Client
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.strategy import Strategy
from fedunlearn.federation.tasks import Update, client_task
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.unlearning.ascent import ascend


class GradientAscent(Strategy):
    """theta <- theta + eta grad L_f(theta), by each forget client on its own images, averaged over them.

    Every forget client climbs its loss until its accuracy is what the retrained model is estimated to have
    (`Federation.estimated_accuracy`), for `epochs` epochs at most. Then the retain clients repair.
    """

    label, colour, marker = "gradient ascent", "#c8553d", "^"

    class Settings(CheckedSettings):
        """Settings of gradient ascent."""

        epochs: int = Field(default=5, ge=1, le=1000, description="at most, by the forget clients")
        lr: float = Field(default=0.05, ge=0, le=100, description="learning rate of their steps")
        clip: float = Field(default=1.0, ge=0, description="norm that their gradients are clipped to")
        repair_rounds: int = Field(
            default=3, ge=0, le=10**6, description="of the retain clients, until the request is applied"
        )
        repair_lr: float = Field(default=0.01, ge=0, le=100, description="learning rate of these rounds")

    @client_task(kind="train", trains=True, compared=False)
    @staticmethod
    def climb(
        client: Client, model: TwoHeadModel, settings: Settings, *, until: dict[str, float], radius: float | None = None
    ) -> Update:
        """Its model's update after gradient ascent on its own images.

        Args:
            until: by client, the class accuracy on its images at which it stops.
            radius: largest distance from the broadcast model; None for any.
        """
        least = until[str(client.id)]
        counts = ascend(
            model,
            client.epochs(settings.epochs),
            examples=client.examples,
            lr=settings.lr,
            clip=settings.clip,
            radius=math.inf if radius is None else radius,
            precision=client.precision,
            finished=lambda: client.accuracy(model) <= least,
        )
        return Update(client.changes(model), client.examples, counts)

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Climb, then repair."""
        until = self.aims(federation, forget)
        federation.apply(federation.run(self.climb, on=forget, until=until).mean())
        self.repair(federation)
        return {"until": until}

    def aims(self, federation: Federation, forget: ForgetSet) -> dict[str, float]:
        """Estimate the retrained model's accuracy on each forget client's images."""
        return {str(client): accuracy for client, accuracy in federation.estimated_accuracy(forget).items()}

    def repair(self, federation: Federation) -> None:
        """Train on with the retain clients."""
        federation.train(on=federation.retain, rounds=self.settings.repair_rounds, lr=self.settings.repair_lr)
