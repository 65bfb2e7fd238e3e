"""Leave and continue: the baseline that forgets nothing on purpose."""

from typing import Any

from flwr.serverapp import Grid

from fedunlearn.federation.requests import Forgetting


class LeaveAndContinue(Forgetting):
    """The leaving clients' output neurons are pruned, and they train no more; what the model knows may fade."""

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Nothing."""
        return {}
