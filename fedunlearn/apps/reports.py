"""Reports as a simulation can write them: its auditor knows who has what."""

from collections.abc import Sequence
from pathlib import Path

from fedunlearn.federation.auditor import auditor_of
from fedunlearn.federation.strategy import strategy_class
from fedunlearn.runs import report
from fedunlearn.runs.ledger import TAKEN_UP
from fedunlearn.runs.run import Run


def write(run: Run, retrained: Sequence[Run] = ()) -> Path:
    """Write a run's report anew; gives its path.

    Args:
        run: that is open.
        retrained: runs in which the forgotten clients never took part, to compare with.

    Raises:
        UserError: they did take part in them, or one was trained on other data.
    """
    auditor, kind = auditor_of(run.config_here()), strategy_class(run.config.strategy)
    words = {"label": kind.label, "own_settings": kind.Settings}
    counts = auditor.class_counts(portions=run.ledger.portions(TAKEN_UP)) if auditor else None
    return report.write(run, counts, run.class_names(), retrained=retrained, **words)
