"""Retraining from scratch: the gold standard, and what it costs."""

from typing import Any

from flwr.serverapp import Grid

from fedunlearn.federation.requests import Forgetting


class Retraining(Forgetting):
    """All rounds so far are trained again from the run's initial weights, by the retained clients alone."""

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Begin anew; the model is that of a run in which the leaving clients never took part."""
        self.server.begin_anew(leaving)
        for round_ in range(1, self.round + 1):
            answer = self.ask_to_train("train", grid, self.sample(round_), costs, "retraining", round_=round_)
            self.server.step(self.federation.mean(answer), answer.moments, round_)
        return {"retrained": self.round}
