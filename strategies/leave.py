"""Leave and continue: the baseline that forgets nothing on purpose."""

from typing import Any

from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.strategy import Strategy


class LeaveAndContinue(Strategy):
    """Prune the forget clients' output neurons and train on without them; what the model knows may fade."""

    label, colour, marker = "leave and continue", "#8d99ae", "v"

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Change nothing: pruning is the run's own."""
        return {}
