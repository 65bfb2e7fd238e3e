"""Gradient ascent on the leaving clients' loss (Wu et al., 2022, "Federated Unlearning: Guarantee the Right of Clients
to Forget")."""

from typing import Any

from flwr.serverapp import Grid

from fedunlearn.federation.requests import Forgetting


class GradientAscent(Forgetting):
    """theta <- theta + eta grad L_f(theta), by each leaving client on its own images, averaged over them.

    Every leaving client ascends (`train.ascend`: clipped steps of `unlearn.ascent_lr`) until its accuracy is what gold
    is foretold to have (`foretold_accuracy`), for `unlearn.ascent_epochs` epochs at most; then the
    retained clients train `unlearn.recover` rounds.
    """

    reads = ("ascent_epochs", "ascent_lr", "clip", "recover", "recover_lr")

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Ascend, then recover."""
        until = self.foretold_accuracy(leaving)
        self.ascend(leaving, grid, costs, until=until)
        self.recover(grid, costs)
        return {"until": until}

    def ascend(self, leaving: list[int], grid: Grid, costs: dict[str, Any], **bounds: float) -> None:
        """Move the model by the mean of the leaving clients' ascents."""
        answer = self.ask_to_train("train.ascend", grid, leaving, costs, "ascent", everybody=True, **bounds)
        self.server.move(self.federation.mean(answer))
