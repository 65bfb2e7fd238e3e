"""Where a run lies and how far it is: what a handle is before anything can be asked of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from fedunlearn.apps.resources import Resources
from fedunlearn.errors import UserError
from fedunlearn.live.background import Background, last_words
from fedunlearn.runs.home import log_of, runs_folder
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.run import Run, last_round

if TYPE_CHECKING:
    from fedunlearn.config import Config


class RunState(StrEnum):
    """Where a run stands."""

    STARTING = "starting"  # its process reads code and data
    LIVE = "live"  # a process works on it
    FINISHED = "finished"  # all rounds are trained
    STOPPED = "stopped"  # nobody works on it, and rounds are missing
    FAILED = "failed"  # its process ended with an error


BUSY = (RunState.STARTING, RunState.LIVE)


@dataclass
class Handle:
    """Says where a run lies and how far it is, live or not.

    Attributes:
        name: of the run.
        home: the state folder that it lies in.
        resources: what commands about it work on.
    """

    name: str
    home: Path
    resources: Resources = Resources()
    _process: Background | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return runs_folder(self.home) / self.name

    @property
    def log(self) -> Path:
        """What the run's process says, where it was started from Python."""
        return log_of(self.home, self.name)

    @property
    def config(self) -> "Config":
        """The settings that the run was started with."""
        with self.opened() as found:
            return found.config_here()

    @property
    def round(self) -> int:
        """How many rounds are trained."""
        return last_round(self.folder)

    @property
    def state(self) -> RunState:
        """Where the run stands: starting, live, finished, stopped or failed."""
        process = self._process
        if is_locked(self.folder):
            return RunState.LIVE
        if process and process.is_working:
            return RunState.LIVE if self._is_trained() else RunState.STARTING
        if process and process.process.returncode and not process.is_stopped:
            return RunState.FAILED
        return RunState.FINISHED if self._is_trained() else RunState.STOPPED

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """Open the run's folder, to see everything: ledger, settings, rows of metrics.

        Raises:
            UserError: the run has not begun yet.
        """
        if not self._has_begun():
            raise UserError(f"run {self.name} has not begun: {self._reason() or f'it is {self.state}'}")
        found = Run.opened(self.folder)
        try:
            yield found
        finally:
            found.ledger.close()

    def _has_begun(self) -> bool:
        return (self.folder / "run.json").exists()

    def _is_trained(self) -> bool:
        return self._has_begun() and self.round >= self.config.rounds

    def _reason(self) -> str:
        """Say why the run's process ended; nothing where it works, or was another one."""
        if self._process and not self._process.is_working:
            return self._process.reason()
        return "" if self._process else last_words(self.log)
