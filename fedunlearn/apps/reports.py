"""Reports of runs, with what an auditor knows where there is one: who has what."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedunlearn.federation.auditor import Auditor, auditor_of
from fedunlearn.federation.strategy import strategy_class
from fedunlearn.runs import report
from fedunlearn.runs.ledger import TAKEN_UP
from fedunlearn.runs.run import Run


def class_counts_of(run: Run, auditor: Auditor | None) -> np.ndarray | None:
    """Count the images of each class that clients have, and then portions of clients; None without an auditor."""
    return auditor.class_counts(portions=run.ledger.portions(TAKEN_UP)) if auditor else None


def write(run: Run, retrained: Sequence[Run] = ()) -> Path:
    """Write a run's report anew; gives its path.

    Args:
        run: that is open.
        retrained: runs in which the forgotten clients never took part, to compare with.

    Raises:
        UserError: they did take part in them, or one was trained on other data.
    """
    return write_with(run, class_counts_of(run, auditor_of(run.config_here())), retrained)


def write_with(run: Run, class_counts: np.ndarray | None, retrained: Sequence[Run] = ()) -> Path:
    """Write a run's report as `write` does, with class counts that are known already."""
    kind = strategy_class(run.config.strategy)
    words = {"label": kind.label, "own_settings": kind.Settings}
    return report.write(run, class_counts, run.class_names(), retrained=retrained, **words)
