"""What a study is made of: steps whose results are files, made once, by any number of processes together."""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.runs import checkpoint
from fedunlearn.runs.report import duration
from fedunlearn.runs.run import HeldError, hold

FORMAT = 2  # of results: another number makes them all anew
PRINT_EVERY = 10.0  # seconds
SAVE_EVERY = 5.0  # seconds
PARTIAL = "partial.safetensors"


class OutOfTimeError(Exception):
    """The time that was asked for is over; everything done so far is saved."""


@dataclass(frozen=True, eq=False)
class Step:
    """One piece of a study.

    Attributes:
        name: a path such as `gold/ce_dl/0-1/seed0`.
        settings: what the result depends on, besides the results of `needs`; goes into the folder's name as a hash.
        needs: the steps whose results it takes.
        work: makes the result, a dict that JSON can hold, and may leave further files in the step's folder.
        cost: how much work it is, in images trained on: for estimates alone.
    """

    name: str
    settings: dict[str, Any]
    needs: tuple["Step", ...]
    work: Callable[["Desk"], dict[str, Any]]
    cost: float

    @cached_property
    def key(self) -> str:
        """Hash of everything that the result depends on."""
        content = json.dumps([FORMAT, self.name, self.settings, [need.key for need in self.needs]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    def folder(self, root: Path) -> Path:
        """Where its files are."""
        return root / "steps" / f"{self.name.replace('/', '.')}-{self.key}"

    def is_done(self, root: Path) -> bool:
        """Whether its result is there."""
        return (self.folder(root) / "result.json").exists()

    def result(self, root: Path) -> dict[str, Any]:
        """What `work` returned, and `seconds`.

        Raises:
            UserError: the file was damaged.
        """
        file = self.folder(root) / "result.json"
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} was cut short ({error}): delete it, and the same command makes it again") from None


@dataclass
class Desk:
    """Where a step's work is done: its folder, the results that it needs, and the clock."""

    root: Path
    step: Step
    over: Callable[[], bool]
    left: Callable[[], str]
    started: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)
    saved: float = 0.0
    earlier: int | None = None

    @property
    def folder(self) -> Path:
        """Where the step's files are."""
        return self.step.folder(self.root)

    def file(self, need: Step, name: str) -> Path:
        """A file that an earlier step has left."""
        return need.folder(self.root) / name

    def result(self, need: Step) -> dict[str, Any]:
        """The result of an earlier step."""
        return need.result(self.root)

    def tick(self, done: int, total: int, unit: str, rate: str = "") -> None:
        """Say how far the work is; called after each unit of it.

        Raises:
            OutOfTimeError: the time is over. Whatever was done must be saved before the call.
        """
        now = time.monotonic()
        self.earlier = done - 1 if self.earlier is None else self.earlier
        if now - self.printed > PRINT_EVERY:
            self.printed = now
            remaining = (now - self.started) / (done - self.earlier) * (total - done)
            log(f"{self.step.name}: {unit} {done} of {total}{rate}, {duration(remaining)} left; {self.left()}")
        if done < total and self.over():
            raise OutOfTimeError

    def save_partial(self, state: dict[str, Any], rows: list) -> None:
        """Keep `state` (tensors, or dicts of them) and `rows` for a later start; not more often than is worth it."""
        if time.monotonic() - self.saved > SAVE_EVERY or self.over():
            checkpoint.save(self.folder / PARTIAL, _flat(state), about={"rows": json.dumps(rows)})
            self.saved = time.monotonic()

    def partial(self) -> tuple[dict[str, Tensor], list] | None:
        """What `save_partial` kept, names of dicts in dicts joined by points; None where nothing is.

        Raises:
            UserError: the file was cut short.
        """
        file = self.folder / PARTIAL
        if not file.exists():
            return None
        state, about = checkpoint.read_tensors(
            file, cure=f"delete it, and the same command begins {self.step.name} anew"
        )
        return state, json.loads(about["rows"])

    def tensors(self, need: Step, name: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a file that an earlier step has left.

        Raises:
            UserError: the file was damaged.
        """
        file, sha256 = self.file(need, name), self.result(need)["files"][name]
        state, _ = checkpoint.read_tensors(file, sha256=sha256, cure=cure(file))
        return {key: value.to(device) for key, value in state.items()}


def check_needs(steps: Sequence[Step], root: Path) -> None:
    """Raise UserError for the first step that needs what is neither there nor among `steps`."""
    made = {step.key for step in steps}
    for step in steps:
        for need in step.needs:
            if not step.is_done(root) and need.key not in made and not need.is_done(root):
                raise UserError(f"{step.name} needs {need.name}, which was not asked for and is not there yet")


def work_on(steps: Sequence[Step], root: Path, *, over: Callable[[], bool], rate: float, workers: int) -> bool:
    """Do what is missing of `steps`, beside other processes that do the same; whether all was done in time.

    Args:
        over: whether to stop, at the next unit of work that is saved.
        rate: seconds a unit of cost, for as long as no step has been finished.
        workers: processes at work, for the estimate of the time left.
    """
    try:
        while missing := [step for step in steps if not step.is_done(root)]:
            ready = [step for step in missing if all(need.is_done(root) for need in step.needs)]
            did_one = any(_do(step, root, over, lambda: time_left(steps, root, rate, workers)) for step in ready)
            if over():
                break
            if not did_one:
                time.sleep(random.uniform(0.2, 1))  # others are at work on them
    except OutOfTimeError:
        pass
    return all(step.is_done(root) for step in steps)


def _do(step: Step, root: Path, over: Callable[[], bool], left: Callable[[], str]) -> bool:
    """Whether the step was this process's to do."""
    folder = step.folder(root)
    try:
        with hold(folder, patience=0):
            if step.is_done(root):
                return True
            desk = Desk(root, step, over, left)
            spent = folder / "seconds"
            before = float(spent.read_text()) if spent.exists() else 0.0
            try:
                result = step.work(desk)
            finally:
                seconds = before + time.monotonic() - desk.started
                checkpoint.write_atomically(spent, f"{seconds:.3f}".encode())
            content = {"step": step.name, "settings": step.settings, "seconds": seconds, "cost": step.cost}
            content |= {"machine": machine(), **result}
            checkpoint.write_atomically(folder / "result.json", json.dumps(content, indent=1).encode())
            (folder / PARTIAL).unlink(missing_ok=True)
            log(f"{step.name}: done in {duration(seconds)}; {left()}")
            return True
    except HeldError:
        return False


def seconds_a_cost(steps: Sequence[Step], root: Path, rate: float) -> float:
    """What a unit of cost takes: measured on finished steps, else `rate`."""
    done = [step.result(root) for step in steps if step.is_done(root)]
    cost = sum(result["cost"] for result in done)
    return sum(result["seconds"] for result in done) / cost if cost else rate


def time_left(steps: Sequence[Step], root: Path, rate: float, workers: int) -> str:
    """An estimate, in words."""
    missing = [step for step in steps if not step.is_done(root)]
    seconds = sum(step.cost for step in missing) * seconds_a_cost(steps, root, rate) / workers
    return f"{len(steps) - len(missing)} of {len(steps)} steps done, about {duration(seconds)} left in all"


def cure(file: Path) -> str:
    """What to do about a damaged file of a step."""
    return f"delete {file.parent}, and the same command makes it again"


def machine() -> str:
    """What the work was done on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def log(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def _flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat = {}
    for name, value in state.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
