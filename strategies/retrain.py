"""Retraining from scratch: what forgetting is measured against, and what it costs."""

from typing import Any

from fedunlearn.federation import tasks
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.rounds import sample
from fedunlearn.federation.strategy import Strategy


class Retraining(Strategy):
    """Train all rounds so far again, from the run's initial weights, on the retain clients alone."""

    label, colour, marker = "retraining", "#222222", "*"

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Begin anew; the model becomes that of a run in which the forget clients never took part."""
        federation.begin_anew()
        for round_ in range(1, federation.round + 1):
            clients = sample(federation.retain, federation.config, round_)
            results = federation.run(tasks.train, on=clients, at_round=round_)
            federation.apply_round(results, results.mean(), round_)
        return {"retrained": federation.round}
