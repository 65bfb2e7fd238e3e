"""Requests of runs that no process holds: `fedunlearn forget` applies them, in a process of its own."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Lock

from fedunlearn.errors import UserError, printable
from fedunlearn.naming import as_command
from fedunlearn.runs.hints import of_run
from fedunlearn.runs.home import runs_folder

MOST = 4  # processes at once
SHOWN = 40  # lines
READ = 16_000  # bytes of the end of a log
LONGEST = 150  # bytes of a run's name in that of a log: a file system takes 255


@dataclass(frozen=True)
class Job:
    """A command that this page has started.

    Attributes:
        run: that it is about.
        command: as a person would type it.
        log: the file that it writes its lines to.
        process: of the operating system.
    """

    run: str
    command: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def status(self) -> int | None:
        """The exit status; None while it is at work."""
        return self.process.poll()

    def lines(self) -> list[str]:
        """Read the last lines that it wrote; none where its log is gone."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - READ))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [printable(line) for line in text.splitlines()[-SHOWN:]]


class Jobs:
    """Starts commands, the last of each run is remembered.

    They are below this process, so that they end with it. A request that is filed stays filed.

    Args:
        home: state folder.
        options: of every command, as `["--engine", "local"]`.
    """

    def __init__(self, home: Path, options: list[str]) -> None:
        self._home, self._options, self._last = home, options, dict[str, Job]()
        self._starting = Lock()

    def of(self, run: str) -> Job | None:
        """Give the last job of a run."""
        return self._last.get(run)

    def words(self, run: str, options: list[str]) -> list[str]:
        """Give the words of the command that asks, with options of the request."""
        return ["forget", *of_run(runs_folder(self._home) / run), *options, *self._options]

    def start(self, run: str, options: list[str], *, given: str = "") -> Job:
        """Start the command that checks a request, files it and applies it.

        Args:
            run: its name.
            options: of the request.
            given: what the command can read from stdin.

        Returns:
            The command; the one that is at work where it is the same, as after a double click.

        Raises:
            UserError: another one is at work for this run, or too many are for others.
        """
        words = self.words(run, options)
        with self._starting:
            last = self._last.get(run)
            if last and last.status is None and last.command == in_shell(words):
                return last
            at_work = [job.run for job in self._last.values() if job.status is None]
            if run in at_work or len(at_work) >= MOST:
                busy = run if run in at_work else at_work[0]
                raise UserError(f"a request of run {busy} is being taken up: ask again in a moment")
            self._last[run] = self._started(run, words, given)
            return self._last[run]

    def _started(self, run: str, words: list[str], given: str) -> Job:
        command = [sys.executable, "-m", "fedunlearn", *words, f"--home={self._home}"]
        name = run.encode()[:LONGEST].decode(errors="ignore")
        log = self._home / "logs" / f"{name}-asked-{datetime.now():%Y%m%d-%H%M%S-%f}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output, tempfile.TemporaryFile() as stdin:
            stdin.write(given.encode())
            stdin.seek(0)
            process = subprocess.Popen(command, stdin=stdin, stdout=output, stderr=subprocess.STDOUT)
        return Job(run, in_shell(words), log, process)


def in_shell(words: list[str]) -> str:
    """Write a command as a person would type it."""
    return as_command(*words)
