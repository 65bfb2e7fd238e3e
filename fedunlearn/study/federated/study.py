"""The federated study, as `run_study` runs it."""

import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from fedunlearn.nn.sgd import LocalSGD
from fedunlearn.study.dag.command import Study
from fedunlearn.study.federated import report
from fedunlearn.study.federated.plan import Plan
from fedunlearn.study.federated.settings import FederatedSettings, load
from fedunlearn.study.pooled.workspace import Workspace


class FederatedStudy(Study):
    """Compares every strategy, from the same base, with the retrained model (the paper's "gold").

    Args:
        words: settings such as `dataset=cifar10` and `study.strategies=[subset,ssd]`.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.

    Example:
        >>> run_study(FederatedStudy(["dataset=digits"]))
        0
    """

    settings: FederatedSettings
    kind = "federated"

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.settings = load(words)

    @property
    def threads(self) -> int:
        """CPU threads a process."""
        return self.settings.train.threads

    @cached_property
    def workspace(self) -> Workspace:
        """This process's data and models."""
        settings = self.settings
        return Workspace(settings, precision=settings.train.precision, attacked=settings.attacked)

    @cached_property
    def plan(self) -> Plan:
        """All tasks, by what they make."""
        return Plan(self.settings, self.workspace)

    def report(self, root: Path) -> Path:
        """Write a report of what has been measured so far; returns the path of its page."""
        return report.write(self.plan, root)

    def probe(self) -> float:
        """Measure on a few steps of an untrained model how many seconds an image takes in training here."""
        train, pool = self.settings.train, self.workspace.pool
        loss = self.settings.loss.model_dump(exclude={"warmup"})
        sgd = LocalSGD(
            self.workspace.new_model("ce_dl", 0),
            momentum=train.momentum,
            weight_decay=train.weight_decay,
            precision=train.precision,
            batch_size=train.batch_size,
        )
        some, seconds = pool.train.all()[: 4 * train.batch_size], 0.0
        for _ in range(2):  # the first is slower
            started = time.perf_counter()
            sgd.fit([pool.train.batches(some, train.batch_size)], lr=train.lr, loss=loss)
            seconds = time.perf_counter() - started
        return seconds / len(some)
