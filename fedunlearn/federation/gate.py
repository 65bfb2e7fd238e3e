"""The gate that every new model passes before it replaces the one that knew the forget clients."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedunlearn.errors import NotNowError
from fedunlearn.federation.handle import Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import floating
from fedunlearn.federation.scores import Scores
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs.budget import MEASURED_BY, Figures, refusal
from fedunlearn.runs.uncertainty import fraction, held_out


class Gate:
    """Compares the model before a request with the one after it.

    Args:
        federation: before the request; the gate remembers its model.
        forget: who is to be forgotten.
        scores: of the model.

    Raises:
        NotNowError: a forget client does not reply, or other retain clients than before; from `verdict` too.
    """

    def __init__(self, federation: Federation, forget: ForgetSet, scores: Scores) -> None:
        self._federation, self._forget = federation, forget
        self._params = federation.state.params
        self._before, self._measured_on = self._figures(scores), scores["retain"]["examples"]
        self._retrained = federation.estimate_retrained(federation.predictions()).total.class_accuracy

    def verdict(self, scores: Scores) -> dict[str, Any]:
        """Say whether the present model, of these scores, may replace the one before, with the figures.

        Returns:
            `passed`, `reason` (empty where it passed), the figures before and after, and whose figures they are.
        """
        if scores["retain"]["examples"] != self._measured_on:
            raise NotNowError("not the same retain clients replied before and after")
        before, after, budget = self._before, self._figures(scores), self._federation.config.forget.budget
        reason = refusal(before, after, self._retrained, budget)
        pairs = {name: [getattr(e, name).value for e in (before, after)] for name in MEASURED_BY}
        errors = {name: [getattr(e, name).error for e in (before, after)] for name in MEASURED_BY}
        changed = changed_fraction(self._params, self._federation.state.params)
        about = {"budget": budget, "retrained": self._retrained, "changed": changed, "measured_by": MEASURED_BY}
        return {"passed": not reason, "reason": reason, **pairs, "errors": errors, **about}

    def _figures(self, scores: Scores) -> Figures:
        """Ask the forget clients how well the present model knows their images; all else is in its scores."""
        federation, forget = self._federation, self._forget
        found = sum(federation.evaluate(forget).values(), Counts())
        counts, predictions = total_counts(federation.class_counts(forget).values()), federation.predictions()
        own = fraction(found.class_accuracy, found.examples)
        others = held_out(predictions.expected_accuracy(counts), predictions.total.examples, counts.numpy())
        retain, test = (fraction(scores[key]["class"], scores[key]["examples"]) for key in ("retain", "test"))
        return Figures(retain, test, own - others)


def changed_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Give the fraction of values that differ, 0..1."""
    pairs = [(value, after[name]) for name, value in floating(before).items()]
    changed = sum(int((old != new).sum()) for old, new in pairs)
    return changed / max(1, sum(old.numel() for old, _ in pairs))
