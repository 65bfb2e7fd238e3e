"""The paper's study, as `run_study` runs it."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fedunlearn.study.dag.command import Study
from fedunlearn.study.pooled import report
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.settings import PaperSettings, load
from fedunlearn.study.pooled.training import Training
from fedunlearn.study.pooled.workspace import PaperWorkspace


class PaperStudy(Study):
    """Makes every table and figure of the paper, on pooled data, each number beside the paper's.

    Args:
        words: settings such as `dataset=cifar10` and `search.trials=20`.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.

    Example:
        >>> run_study(PaperStudy(["dataset=digits"]))
        0
    """

    settings: PaperSettings
    kind = "paper"

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.settings = load(words)

    @property
    def threads(self) -> int:
        """CPU threads a process."""
        return self.settings.learning.threads

    @cached_property
    def workspace(self) -> PaperWorkspace:
        """This process's data and models."""
        return PaperWorkspace(self.settings)

    @cached_property
    def plan(self) -> Plan:
        """All tasks, by what they make."""
        return Plan(self.settings, self.workspace)

    def report(self, root: Path) -> Path:
        """Write a report of what has been measured so far; returns the path of its page."""
        return report.write(self.plan, root)

    def probe(self) -> float:
        """Measure on a few steps of an untrained model how many seconds an image takes in training here."""
        recipe, pool = self.settings.recipe("ce_dl"), self.workspace.pool
        some = pool.train.all()[: 4 * recipe.batch_size]
        model = self.workspace.new_model("ce_dl", 0)
        training = Training(model, pool.train, some, replace(recipe, warmup=0.0), 0)
        training.run_epoch()
        training.run_epoch()
        return training.history[-1][-1] / len(some)
