"""How near each strategy comes to the retrained model, in a sentence or two that anybody can read."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

from fedunlearn.naming import named
from fedunlearn.runs.uncertainty import Estimate, fraction
from fedunlearn.runs.verdicts import Level, Verdict
from fedunlearn.study.federated.plan import NOTHING_ELSE
from fedunlearn.study.federated.tables import RETRAINED, Row, label

Sizes = dict[str, int]
"""Images that a measure is an accuracy of, by measure."""


@dataclass(frozen=True)
class Compared:
    """Compares a strategy with the retrained model, at one time after a request.

    Attributes:
        row: the strategy's.
        forget: accuracy on the forgotten clients' images less the retrained model's.
        test: the same of the test images.
        work: what it cost, in percent of retraining; None where that is not known.
    """

    row: Row
    forget: Estimate
    test: Estimate
    work: float | None = None

    @property
    def is_like_retrained(self) -> bool:
        """Say whether the forgotten clients' accuracy cannot be told apart from the retrained model's."""
        return not (self.forget.is_above_zero or self.forget.is_below_zero)


def verdicts(found: Sequence[Compared]) -> list[Verdict]:
    """Say of every strategy how near it comes, the nearest first; and whether the case can tell them apart at all."""
    if not found:
        return []
    nearest_first = sorted(found, key=lambda compared: abs(compared.forget.value))
    said = [of_strategy(compared) for compared in nearest_first]
    idle = next((compared for compared in found if compared.row.strategy == NOTHING_ELSE), None)
    if idle and idle.is_like_retrained and len(found) > 1:
        text = (
            f"This case cannot tell strategies apart: even “{label(NOTHING_ELSE)}”, which forgets nothing on purpose, "
            "is like the retrained model. Take more seeds, more images, or a model that memorises more."
        )
        unproven = [replace(one, level=Level.PLAIN) if one.level == Level.GOOD else one for one in said]
        return [Verdict(text, Level.PLAIN, "Too easy"), *unproven]
    return said


def of_strategy(compared: Compared) -> Verdict:
    """Say how near one strategy comes to the retrained model, at what price."""
    row, forget, test = compared.row, compared.forget, compared.test
    who, clients = label(row.strategy), named(row.forgotten)
    when = (
        "When the request is applied"
        if row.after == 0
        else f"{row.after} round{'s' * (row.after > 1)} after the request"
    )
    numbers = f"{statistics.fmean(row.values['forget']):.2f} of the images of {clients} right, the retrained model "
    numbers += f"{statistics.fmean(row.retrained['forget']):.2f} (difference {forget.short(signed=True)})"
    if forget.is_above_zero:
        level, end = Level.WARNING, "It still knows them better than a model that never saw them."
        title = "Knows more"
    elif forget.is_below_zero:
        level, end = Level.WARNING, "It gets fewer right than a model that never saw them: it forgets too much."
        title = "Forgets too much"
    else:
        level, end, title = Level.GOOD, "The two cannot be told apart.", "Like the retrained model"
    if test.is_below_zero:
        level = Level.WARNING
        end += f" But it gets fewer of the test images right: {test.short(signed=True)}."
        title = title if title != "Like the retrained model" else "Forgotten at a price"
    cost = "" if compared.work is None else f" Until it is applied it takes {compared.work:.1f} % of retraining's work."
    return Verdict(f"{when} the model gets {numbers}. {end}{cost}", level, f"{who}: {title[0].lower()}{title[1:]}")


def compared(rows: Sequence[Row], forgotten: tuple[int, ...], sizes: Sizes) -> list[Compared]:
    """Compare every strategy with the retrained model as late after the request as was measured of all of them.

    Args:
        rows: of one case and pipeline.
        forgotten: the clients whose request it is about.
        sizes: how many images there are.
    """
    ours = [row for row in rows if row.forgotten == forgotten and row.strategy != RETRAINED]
    times = [{row.after for row in ours if row.strategy == strategy} for strategy in {row.strategy for row in ours}]
    common = set.intersection(*times) if times else set()
    return [
        Compared(row, difference(row, "forget", sizes["forget"]), difference(row, "test", sizes["test"]))
        for row in ours
        if row.after == max(common, default=None)
    ]


def difference(row: Row, measure: str, images: int) -> Estimate:
    """Estimate how far a strategy's accuracy is above the retrained model's of the same seed.

    The standard error is the larger of two: that over seeds, and that of so many images, which the seeds share.
    """
    pairs = row.pairs(measure)
    each = [a - b for a, b in pairs]
    ours, target = (fraction(statistics.fmean(side), images) for side in zip(*pairs, strict=True))
    over_seeds = statistics.stdev(each) / sqrt(len(each)) if len(each) > 1 else 0.0
    return Estimate(row.difference(measure), max(over_seeds, (ours - target).error))
