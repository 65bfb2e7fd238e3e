"""What a study is made of: tasks whose results are files, made once, by any number of processes together."""

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedunlearn.errors import UserError
from fedunlearn.log import prefixed
from fedunlearn.runs import checkpoint
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import duration
from fedunlearn.runs.lock import LockedError, lock

FORMAT = 3  # of results: another number makes them all anew
LOG_EVERY = 10.0  # seconds
SAVE_EVERY = 5.0  # seconds
PARTIAL = "partial.safetensors"

log = getLogger("fedunlearn")


class OutOfTimeError(Exception):
    """The time that was asked for is over; everything done so far is saved."""


@dataclass(frozen=True, eq=False)
class Task:
    """One piece of a study, a node of its DAG.

    Attributes:
        name: a path such as `retrained/ce_dl/0-1/seed0`.
        settings: what the result depends on, besides the results of `needs`; goes into the folder's name as a hash.
        needs: the tasks whose results it takes.
        work: makes the result, a dict that JSON can hold, and may leave further files in the task's folder.
        cost: how much work it is, in images trained on: for estimates alone.
        defaults: of the settings, as far as they have any. Earlier versions may not have had these settings yet.
    """

    name: str
    settings: Mapping[str, Any]
    needs: tuple["Task", ...]
    work: Callable[["TaskContext"], dict[str, Any]]
    cost: float
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash everything that the result depends on."""
        content = json.dumps([FORMAT, self.name, self.settings, [need.key for need in self.needs]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    def folder(self, root: Path) -> Path:
        """Give the folder of the task's files."""
        return root / "tasks" / f"{self.prefix}-{self.key}"

    @property
    def prefix(self) -> str:
        """Give what the folder's name begins with, whatever the settings are."""
        return self.name.replace("/", ".")

    def is_done(self, root: Path) -> bool:
        """Say whether the result is there."""
        return (self.folder(root) / "result.json").exists()

    def result(self, root: Path) -> dict[str, Any]:
        """Read what `work` returned, and `seconds`, `machine` and the task's name and settings.

        Raises:
            UserError: the file was damaged.
        """
        return read(self.folder(root) / "result.json")


def read(file: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        UserError: the file was damaged.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} was cut short ({error}): delete it, and the same command makes it again") from None


@dataclass
class TaskContext:
    """Where a task's work is done: its folder, the results that it needs, and the clock.

    Attributes:
        root: the study's folder.
        over: says whether to stop at the next unit of work that is saved.
        left: says how much is left of the whole study.
    """

    root: Path
    task: Task
    over: Callable[[], bool]
    left: "Left"
    started: float = field(default_factory=time.monotonic)
    logged: float = field(default_factory=time.monotonic)
    saved: float = 0.0
    earlier: int | None = None

    @property
    def folder(self) -> Path:
        """Give the folder of the task's files."""
        return self.task.folder(self.root)

    def file(self, need: Task, name: str) -> Path:
        """Give the path of a file that an earlier task has left."""
        return need.folder(self.root) / name

    def result(self, need: Task) -> dict[str, Any]:
        """Read the result of an earlier task."""
        return need.result(self.root)

    def tick(self, done: int, total: int, unit: str, rate: str = "", *, begun: int = 0) -> None:
        """Log how far the work is; to be called after each unit of it.

        Args:
            begun: units of `total` that belong to an earlier task.

        Raises:
            OutOfTimeError: the time is over. Whatever was done must be saved before the call.
        """
        now = time.monotonic()
        self.earlier = done - 1 if self.earlier is None else self.earlier
        if now - self.logged > LOG_EVERY:
            self.logged = now
            seconds, just_done, cost = now - self.started, done - self.earlier, self.task.cost / max(1, total - begun)
            remaining = duration(seconds / just_done * (total - done))
            left = self.left.in_words(cost * (done - begun), cost=cost * just_done, seconds=seconds)
            log.info(f"{unit} {done} of {total}{rate}, {remaining} left; {left}")
        if done < total and self.over():
            raise OutOfTimeError

    def save_partial(self, state: Mapping[str, Any], rows: list) -> None:
        """Keep `state` (tensors, or dicts of them) and `rows` for a later start; not more often than is worth it."""
        if time.monotonic() - self.saved > SAVE_EVERY or self.over():
            checkpoint.save(self.folder / PARTIAL, _flat(state), about={"rows": json.dumps(rows)})
            self.saved = time.monotonic()

    def partial(self) -> tuple[dict[str, Tensor], list] | None:
        """Read what `save_partial` kept, names of dicts in dicts joined by points; None where nothing is.

        Raises:
            UserError: the file was cut short.
        """
        file = self.folder / PARTIAL
        if not file.exists():
            return None
        state, about = checkpoint.read_tensors(
            file, hint=f"delete it, and the same command begins {self.task.name} anew"
        )
        return state, json.loads(about["rows"])

    def tensors(self, need: Task, name: str, device: torch.device) -> dict[str, Tensor]:
        """Read the tensors of a file that an earlier task has left.

        Raises:
            UserError: the file was damaged.
        """
        file, sha256 = self.file(need, name), self.result(need)["files"][name]
        state, _ = checkpoint.read_tensors(file, sha256=sha256, hint=hint(file))
        return {key: value.to(device) for key, value in state.items()}


def check_needs(tasks: Sequence[Task], root: Path) -> None:
    """Raise UserError for the first task that needs what is neither there nor among `tasks`."""
    made = {task.key for task in tasks}
    for task in tasks:
        for need in task.needs:
            if not task.is_done(root) and need.key not in made and not need.is_done(root):
                raise UserError(f"{task.name} needs {need.name}, which was not asked for and is not there yet")


def work_on(tasks: Sequence[Task], root: Path, *, over: Callable[[], bool], rate: float, workers: int) -> bool:
    """Do what is missing of `tasks`, beside other processes that do the same.

    Args:
        over: says whether to stop, at the next unit of work that is saved.
        rate: seconds a unit of cost, for as long as nothing has been done here.
        workers: processes at work, for the estimate of the time left.

    Returns:
        Whether all was done in time.
    """
    left = Left(tasks, root, rate, workers)
    try:
        while missing := [task for task in tasks if not task.is_done(root)]:
            ready = [task for task in missing if all(need.is_done(root) for need in task.needs)]
            did_one = any(_do(task, root, over, left) for task in ready)
            if over():
                break
            if not did_one:
                time.sleep(random.uniform(0.2, 1))  # others are at work on them
    except OutOfTimeError:
        pass
    return all(task.is_done(root) for task in tasks)


def _do(task: Task, root: Path, over: Callable[[], bool], left: "Left") -> bool:
    """Do the task unless another process is at it; returns whether it was this process's to do."""
    folder = task.folder(root)
    try:
        with lock(folder, patience=0), prefixed(task.name):
            if task.is_done(root):
                return True
            context = TaskContext(root, task, over, left)
            spent = folder / "seconds"
            before = float(spent.read_text()) if spent.exists() else 0.0
            try:
                result = task.work(context)
            finally:
                seconds = before + time.monotonic() - context.started
                write_atomically(spent, f"{seconds:.3f}".encode())
            content = {"task": task.name, "format": FORMAT, "settings": task.settings, "seconds": seconds}
            content |= {"cost": task.cost, "machine": machine(), **result}
            write_atomically(folder / "result.json", json.dumps(content, indent=1).encode())
            (folder / PARTIAL).unlink(missing_ok=True)
            log.info(f"done in {duration(seconds)}; {left.in_words()}")
            return True
    except LockedError as error:
        if error.folder != folder:  # work in another folder failed
            raise
        return False


def seconds_a_cost(tasks: Sequence[Task], root: Path, rate: float) -> float:
    """Measure on finished tasks what a unit of cost takes; give `rate` where there are none."""
    done = [task.result(root) for task in tasks if task.is_done(root)]
    cost = sum(result["cost"] for result in done)
    return sum(result["seconds"] for result in done) / cost if cost else rate


class Left:
    """Estimates how much is left of a study, by what has been done since it was started.

    What an earlier start has done may be of another machine, or of one that had other work.
    """

    def __init__(self, tasks: Sequence[Task], root: Path, rate: float, workers: int) -> None:
        self.tasks, self.root, self.workers = tasks, root, workers
        self.rate = seconds_a_cost(tasks, root, rate)
        self.to_do = [task for task in tasks if not task.is_done(root)]

    def in_words(self, done: float = 0.0, *, cost: float = 0.0, seconds: float = 0.0) -> str:
        """Say how much is left.

        Args:
            done: of the cost of a task that is not finished.
            cost: as much of it as was done since the start, which took so many seconds.
        """
        missing = [task for task in self.to_do if not task.is_done(self.root)]
        for result in [task.result(self.root) for task in self.to_do if task.is_done(self.root)]:
            cost, seconds = cost + result["cost"], seconds + result["seconds"]
        pace = seconds / cost if cost else self.rate
        left = pace * (sum(task.cost for task in missing) - done) / max(1, min(self.workers, len(missing)))
        return f"{len(self.tasks) - len(missing)} of {len(self.tasks)} tasks done, about {duration(left)} left in all"


def hint(file: Path) -> str:
    """Say what to do about a damaged file of a task."""
    return f"delete {file.parent}, and the same command makes it again"


def machine() -> str:
    """Name what the work is done on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
