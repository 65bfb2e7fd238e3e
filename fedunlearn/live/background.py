"""A `fedunlearn` command in a process of its own, which Ctrl-C in a notebook and a new kernel leave alone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import psutil

from fedunlearn.apps.signals import SIGNALS
from fedunlearn.errors import UserError
from fedunlearn.runs.files import named_in_errors
from fedunlearn.runs.lock import holder, holder_trains, is_locked

POLL_SECONDS = 0.2
STOP_SECONDS = 30
WIDTH = 100  # characters, of a line that is written over
STOPPED = tuple(status for number in SIGNALS for status in (128 + number, -number))  # later, or before it listens
A_ROUND = re.compile(r" *round +\d+/\d+ ")
SAID = re.compile(
    r"^(?:error: (.*)|(stopped by .*)|((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)|(request r\d+ is .*))$"
)


_started: list[subprocess.Popen[bytes]] = []  # those that may be at work, also where nobody has a handle on them


@dataclass
class Background:
    """A command at work, and the file that it writes its lines to.

    Attributes:
        process: the command's.
        log: the file.
        begins: bytes that were in it before.
    """

    process: subprocess.Popen[bytes]
    log: Path
    begins: int

    @classmethod
    def started(cls, words: Sequence[str], log: Path, *, output: int | None = None) -> "Background":
        """Start `python -m fedunlearn` in a session of its own, so that no signal of this one reaches it.

        Args:
            words: of the command.
            log: what it says is added at the end.
            output: file descriptor for its standard output; without one that goes into the log too.
        """
        paths = [os.path.abspath(path) for path in sys.path]  # what can be imported here can be imported there
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment.pop("FORCE_COLOR", None)  # a notebook's kernel has it, and a log has no colours
        with named_in_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("ab")
        with file:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedunlearn", *words],
                stdin=subprocess.DEVNULL,
                stdout=file if output is None else output,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
            _started[:] = [*(each for each in _started if each.poll() is None), process]
            return cls(process, log, file.tell())

    @property
    def is_working(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def is_stopped(self) -> bool:
        """Whether somebody has ended it."""
        return self.process.poll() in STOPPED

    def reason(self) -> str:
        """Say why it ended as it did, in its own words."""
        status = self.process.poll() or 0
        ended = f"{signal.Signals(-status).name} ended it" if status < 0 else ""
        return ended or last_words(self.log, self.begins) or f"it ended with status {status}"

    def stop(self) -> None:
        """End it with all that it started."""
        if self.is_working:
            self.process.terminate()
            self.process.wait()


def end_run(folder: Path) -> None:
    """End the process that trains a run, or applies its requests, and wait until it has let go of the run.

    Raises:
        UserError: it does not end, or another process holds the run.
    """
    name, number = folder.name, holder(folder)
    if not holder_trains(folder):
        raise UserError(f"process {number} holds run {name}, and does not train it: wait for it, or end it")
    try:
        process = psutil.Process(int(number))
        if (folder / "lock").resolve() not in [Path(file.path) for file in process.open_files()]:
            raise psutil.NoSuchProcess(process.pid)  # another one has its id now
        process.terminate()
    except (ValueError, psutil.Error) as error:
        if is_locked(folder):
            raise UserError(f"run {name} goes on: process {number} cannot be ended ({error})") from error
    deadline = time.monotonic() + STOP_SECONDS
    while is_locked(folder, patience=0):
        if time.monotonic() > deadline:
            raise UserError(f"run {name} goes on: process {number} has not let go of it in {STOP_SECONDS} s")
        time.sleep(POLL_SECONDS)


def last_words(log: Path, begins: int = 0) -> str:
    """Give the line of a log that says why a command ended; nothing where there is none."""
    lines = log.read_bytes()[begins:].decode(errors="replace").splitlines() if log.exists() else []
    found = [match for match in map(SAID.match, lines) if match]
    return next(filter(None, found[-1].groups())) if found else ""


@dataclass
class Lines:
    """Shows what is new in a log; on a screen the lines of rounds are one, which each overwrites.

    Attributes:
        log: the file, which may not be there yet.
        shown: bytes of it that were shown.
        rounds_of: with a name, only the lines of rounds are shown, and begin with it.
    """

    log: Path
    shown: int = 0
    rounds_of: str = ""
    _is_open: bool = field(default=False, init=False)

    def show(self) -> None:
        """Show the lines that have been finished since."""
        if not self.log.exists():
            return
        with self.log.open("rb") as file:
            file.seek(self.shown)
            new = file.read().rpartition(b"\n")[0]
        self.shown += len(new) + bool(new)
        for line in new.decode(errors="replace").splitlines():
            self._say(line)

    def close(self) -> None:
        """End a line that was to be overwritten."""
        if self._is_open:
            print(file=screen(), flush=True)
            self._is_open = False

    def _say(self, line: str) -> None:
        is_round = bool(A_ROUND.match(line))
        if is_round and can_overwrite():
            print(f"\r{self.rounds_of}{line:<{WIDTH}}", end="", file=screen(), flush=True)
            self._is_open = True
        elif is_round or not self.rounds_of:
            self.close()
            print(f"{self.rounds_of}{line}", file=screen(), flush=True)


def screen() -> TextIO:
    """Say where progress goes: below a notebook's cell, where stderr looks like an error, else to stderr."""
    return sys.stdout if is_notebook() else sys.stderr


def can_overwrite() -> bool:
    """Say whether a line can be written over on the screen."""
    return is_notebook() or screen().isatty()


def is_notebook() -> bool:
    """Say whether this process is a notebook's kernel."""
    return "ipykernel" in sys.modules


def followed(
    is_working: Callable[[], bool],
    lines: Lines,
    *,
    interrupted: str,
    timeout: float | None = None,
    late: str = "",
    quiet: bool = False,
) -> None:
    """Show what is said until the work has ended.

    Args:
        is_working: says whether it goes on.
        lines: what it says.
        interrupted: what is said after Ctrl-C; the work goes on.
        timeout: seconds after which waiting is given up; None for never.
        late: what is then raised.
        quiet: show nothing.

    Raises:
        TimeoutError: after `timeout` seconds; the work goes on.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            goes_on = is_working()  # first: what it says before its end is then there to be shown
            if not quiet:
                lines.show()
            if not goes_on:
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(late)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        lines.close()
        print(interrupted, file=screen())
        raise
    finally:
        lines.close()
