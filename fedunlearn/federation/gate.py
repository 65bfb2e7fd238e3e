"""The gate that every new model passes before it replaces the one that knew the forget clients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedunlearn.errors import NotNowError
from fedunlearn.federation.handle import Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import floating
from fedunlearn.federation.scores import Scores
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs.uncertainty import Estimate, fraction, held_out

AT_LEAST = 0.1  # of a memorisation gap must be gone
MEASURED_BY = {"retain": "the retain clients", "test": "the server", "gap": "the forget clients"}


@dataclass(frozen=True)
class Evidence:
    """What is known of a model, before or after a request.

    Attributes:
        params: everything of the model, by name.
        retain: class accuracy on the retain clients' images, as they count it.
        test: class accuracy on the server's held-out images.
        gap: how much better the forget clients' images are known, as they say, than held-out ones of their classes.
    """

    params: Mapping[str, Tensor]
    retain: Estimate
    test: Estimate
    gap: Estimate


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
        self._before, self._measured_on = self._evidence(scores), scores["retain"]["examples"]
        self._retrained = federation.estimate_retrained(federation.predictions()).total.class_accuracy

    def verdict(self, scores: Scores) -> dict[str, Any]:
        """Say whether the present model, of these scores, may replace the one before, with the figures.

        Returns:
            `passed`, `reason` (empty where it passed), the figures before and after, and whose figures they are.
        """
        if scores["retain"]["examples"] != self._measured_on:
            raise NotNowError("not the same retain clients replied before and after")
        before, after, budget = self._before, self._evidence(scores), self._federation.config.forget.budget
        reason = refusal(before, after, self._retrained, budget)
        pairs = {name: [getattr(e, name).value for e in (before, after)] for name in MEASURED_BY}
        changed = changed_fraction(before.params, after.params)
        about = {"budget": budget, "retrained": self._retrained, "changed": changed, "measured_by": MEASURED_BY}
        return {"passed": not reason, "reason": reason, **pairs, **about}

    def _evidence(self, scores: Scores) -> Evidence:
        """Ask the forget clients how well the present model knows their images; all else is in its scores."""
        federation, forget = self._federation, self._forget
        found = sum(federation.evaluate(forget).values(), Counts())
        counts, predictions = total_counts(federation.class_counts(forget).values()), federation.predictions()
        own = fraction(found.class_accuracy, found.examples)
        others = held_out(predictions.expected_accuracy(counts), predictions.total.examples, counts.numpy())
        retain, test = (fraction(scores[key]["class"], scores[key]["examples"]) for key in ("retain", "test"))
        return Evidence(federation.state.params, retain, test, own - others)


def refusal(before: Evidence, after: Evidence, retrained: float, budget: float) -> str:
    """Give the reason why a model may not replace another; nothing where it may.

    It may not where accuracy on the retain clients' or on held-out images falls by more than the budget, where the
    forget clients' images are known better than before, or where they were memorised and as good as nothing of that is
    gone. Chance is given two standard errors.

    Args:
        retrained: estimated accuracy of the retrained model on held-out images. Where it is below that of the model
            before, as without the only owner of a class, the budget counts from it.
        budget: of accuracy, 0..1.
    """
    allowed = Estimate(budget, 0.0)
    expected = Estimate(min(before.test.value, retrained), before.test.error)
    for who, old, new in (
        ("the retain clients' images", before.retain, after.retain),
        ("held-out images", expected, after.test),
    ):
        if (old - new - allowed).is_above_zero:
            return f"accuracy on {who} is {new.value:.3f}, to be {old.value:.3f} (forget.budget={budget:g})"
    if (after.gap - before.gap).is_above_zero:
        return (
            f"the memorisation gap of the forget clients grows from {before.gap.value:+.3f} to {after.gap.value:+.3f}"
        )
    memorised = (before.gap - allowed).is_above_zero
    if memorised and after.gap.value > (1 - AT_LEAST) * before.gap.value:
        return f"nothing is forgotten: the memorisation gap was {before.gap.value:+.3f}, and is {after.gap.value:+.3f}"
    return ""


def changed_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Give the fraction of values that differ, 0..1."""
    pairs = [(value, after[name]) for name, value in floating(before).items()]
    changed = sum(int((old != new).sum()) for old, new in pairs)
    return changed / max(1, sum(old.numel() for old, _ in pairs))
