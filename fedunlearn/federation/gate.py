"""The gate that every new model passes before it replaces the one that knew the forget clients."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import getLogger
from typing import Any

from torch import Tensor

from fedunlearn.errors import NotNowError
from fedunlearn.federation.handle import Federation, ForgetSet, total_counts
from fedunlearn.federation.messages import floating
from fedunlearn.federation.scores import Scores
from fedunlearn.nn.evaluate import Predictions
from fedunlearn.runs.budget import MEASURED_BY, Figures, refusal
from fedunlearn.runs.uncertainty import Estimate, fall, fraction, held_out

log = getLogger("fedunlearn")

FEWEST = 3  # retain clients, of which one can be the odd one
Counted = Mapping[str, float]
Accuracies = Mapping[str, Counted]


class Gate:
    """Compares the model before a request with the one after it, of classes that leave whole on no held-out image.

    Args:
        federation: before the request; the gate remembers its model.
        forget: who is to be forgotten.
        scores: of the model.
        committed: predictions of the model as it was committed. Where its BatchNorm statistics were better than those
            that have been estimated since, it is the one to keep up with.
        needs_all: whether every forget client must reply. One that is gone cannot say how well its images are known,
            and the gate does without in the end.

    Raises:
        NotNowError: a forget client does not reply that must, or replies only before the request, or other retain
            clients do; from `verdict` too.
    """

    def __init__(
        self,
        federation: Federation,
        forget: ForgetSet,
        scores: Scores,
        committed: Predictions,
        *,
        needs_all: bool = False,
    ) -> None:
        self._federation, self._forget = federation, forget
        self._params = federation.state.params
        self._present = sorted(federation.class_counts(forget)) if needs_all else federation.replying(forget)
        if absent := [client for client in forget if client not in self._present]:
            who = federation.named(absent, capital=True)
            log.warning("── %s did not reply: nobody says how well the model knows its images", who)
        found = max(committed, federation.predictions(), key=lambda found: found.total.class_accuracy)
        self._before, self._scores = self._figures(scores, found), scores
        self._budget = federation.config.forget.budget
        self._predictions = found.without(forget.classes)
        self._most_loss = federation.round_gate.most_loss(self._predictions.total.mean_loss)
        self._retrained = federation.estimate_retrained(found).without(forget.classes).total.class_accuracy

    def verdict(self, scores: Scores) -> dict[str, Any]:
        """Say whether the present model, of these scores, may replace the one before, with the figures.

        Returns:
            `passed`, `reason` (empty where it passed), the figures before and after, and whose figures they are.
        """
        both = self._scores["retain_clients"].keys() & scores["retain_clients"].keys()
        if not both and scores["retain"]["examples"] != self._scores["retain"]["examples"]:
            raise NotNowError("not the same retain clients replied before and after")
        predictions = self._federation.predictions()
        after = self._figures(scores, predictions)
        predictions = predictions.without(self._forget.classes)
        old, new = without_extremes(self._scores["retain_clients"], scores["retain_clients"])
        before = replace(self._before, retain=total(old) or self._before.retain)
        after = replace(after, retain=total(new) or after.retain)
        test_fall = fall(self._predictions.hits().numpy(), predictions.hits().numpy())
        about = {
            "retrained": self._retrained,
            "budget": self._budget,
            "loss": predictions.total.mean_loss,
            "most_loss": self._most_loss,
        }
        reason = refusal(before, after, test_fall=test_fall, **about)
        known = {name: by for name, by in MEASURED_BY.items() if getattr(before, name)}
        pairs = {name: [getattr(e, name).value for e in (before, after)] for name in known}
        errors = {name: [getattr(e, name).error for e in (before, after)] for name in known}
        changed = changed_fraction(self._params, self._federation.state.params)
        return {
            "passed": not reason,
            "reason": reason,
            **pairs,
            "errors": errors,
            "test_fall": [test_fall.value, test_fall.error],
            **about,
            "changed": changed,
            "measured_by": known,
        }

    def _figures(self, scores: Scores, predictions: Predictions) -> Figures:
        """Give the figures of the present model; all but the forget clients' are in its scores."""
        retain = fraction(scores["retain"]["class"], scores["retain"]["examples"])
        kept = predictions.without(self._forget.classes).total
        test = fraction(kept.class_accuracy, kept.examples)
        return Figures(retain, test, self._gap(predictions) if self._present else None)

    def _gap(self, predictions: Predictions) -> Estimate:
        """Ask the forget clients that are there how much better their images are known than held-out ones."""
        found = self._federation.counts(self._present)
        counts = total_counts(self._federation.class_counts(self._present).values())
        own = fraction(found.class_accuracy, found.examples)
        return own - held_out(predictions.expected_accuracy(counts), predictions.total.examples, counts.numpy())


def without_extremes(before: Accuracies, after: Accuracies) -> tuple[list[Counted], list[Counted]]:
    """Give clients' scores, where no change is larger than the second largest, nor smaller than the second smallest.

    So no single one of three or more clients makes a good model look bad, or a bad one look good, and all images count.

    Args:
        before, after: scores by client, of the two models; those count that are in both.

    Example:
        >>> same = {"class": 0.9, "examples": 100}
        >>> lie = {"class": 0.0, "examples": 100}
        >>> _, after = without_extremes({"0": same, "1": same, "2": same}, {"0": same, "1": lie, "2": same})
        >>> [score["class"] for score in after]
        [0.9, 0.9, 0.9]
    """
    both = sorted(before.keys() & after.keys())
    changes = sorted(after[client]["class"] - before[client]["class"] for client in both)
    least, most = (changes[1], changes[-2]) if len(both) >= FEWEST else (-1.0, 1.0)

    def believed(client: str) -> Counted:
        change = after[client]["class"] - before[client]["class"]
        return {**after[client], "class": before[client]["class"] + min(max(change, least), most)}

    return [before[client] for client in both], [believed(client) for client in both]


def total(scores: Iterable[Counted]) -> Estimate | None:
    """Give the accuracy on the images of some clients together; None for no clients."""
    pairs = [(score["class"], score["examples"]) for score in scores]
    examples = sum(count for _, count in pairs)
    return fraction(sum(value * count for value, count in pairs) / examples, examples) if examples else None


def changed_fraction(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Give the fraction of values that differ, 0..1."""
    pairs = [(value, after[name]) for name, value in floating(before).items()]
    changed = sum(int((old != new).sum()) for old, new in pairs)
    return changed / max(1, sum(old.numel() for old, _ in pairs))
