"""What a request may cost: the figures before and after it, and the reason why a model may not replace another."""

import math
from dataclasses import dataclass

from fedunlearn.runs.uncertainty import Estimate

AT_LEAST = 0.1  # of a memorisation gap must be gone
ROUNDING = 1e-9  # of a difference of two accuracies
MEASURED_BY = {"retain": "the retain clients", "test": "the server", "gap": "the forget clients"}


@dataclass(frozen=True)
class Figures:
    """How good a model is, and how well it knows the forget clients' images.

    Attributes:
        retain: class accuracy on the retain clients' images, as they count it.
        test: class accuracy on the server's held-out images.
        gap: how much better the forget clients' images are known, as they say, than held-out ones of their classes.
            None where they say nothing.
    """

    retain: Estimate
    test: Estimate
    gap: Estimate | None = None


def refusal(
    before: Figures,
    after: Figures,
    *,
    test_fall: Estimate,
    retrained: float,
    budget: float,
    loss: float = 0.0,
    most_loss: float = math.inf,
) -> str:
    """Give the reason why a model may not replace another; nothing where it may.

    It may not where accuracy on the retain clients' or on held-out images falls by more than the budget, where the
    forget clients' images are known better than before, or where they were memorised and as good as nothing of that is
    gone. Of clients that say nothing nobody knows that. A fall of no more than a standard error may be chance, and
    passes.

    Args:
        test_fall: how much accuracy on held-out images falls; of the same images before and after.
        retrained: estimated accuracy of the retrained model on held-out images. Where it is below that of the model
            before, as without the only owner of a class, the budget counts from it.
        budget: of accuracy, 0..1.
        loss: class cross-entropy on held-out images after the request, in nats. With a large one a model may be as
            accurate as before, and cannot be trained any more.
        most_loss: that it may be.
    """
    expected = min(before.test.value, retrained)
    for who, old, new, fall in (
        ("the retain clients' images", before.retain.value, after.retain.value, before.retain - after.retain),
        ("held-out images", expected, after.test.value, test_fall),
    ):
        if old - new > budget + ROUNDING and fall.value > fall.error:
            return f"accuracy on {who} is {new:.3f}, to be {old - budget:.3f} at least (forget.budget={budget:g})"
    if loss > most_loss:
        return f"the loss on held-out images is {loss:.3g}, to be {most_loss:.3g} at most (round_band)"
    if before.gap is None or after.gap is None:
        return ""
    if (after.gap - before.gap).is_above_zero:
        return (
            f"the memorisation gap of the forget clients grows from {before.gap.value:+.3f} to {after.gap.value:+.3f}"
        )
    memorised = (before.gap - Estimate(budget, 0.0)).is_above_zero
    if memorised and after.gap.value > (1 - AT_LEAST) * before.gap.value:
        return f"nothing is forgotten: the memorisation gap was {before.gap.value:+.3f}, and is {after.gap.value:+.3f}"
    return ""
