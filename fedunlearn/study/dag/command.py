"""Running a study: what is missing of it is done, by one process or several."""

import json
import multiprocessing
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table

from fedunlearn import malloc
from fedunlearn.config import state_home
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.nn.precision import precision_on
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import duration
from fedunlearn.study.dag.earlier import adopt, agree
from fedunlearn.study.dag.settings import StudySettings, defaults_of
from fedunlearn.study.dag.tasks import Task, check_needs, seconds_a_cost, work_on

UNFINISHED = 3
IDENTITY = ("dataset", "scale", "clients", "partition", "model")

log = getLogger("fedunlearn")


class StudyData(Protocol):
    """The images of a study, and the device on which it works with them."""

    @property
    def device(self) -> torch.device:
        """Where models are."""
        ...

    @property
    def precision(self) -> str:
        """Of forward and backward passes (`nn.precision`)."""
        ...

    @property
    def dataset(self) -> Dataset:
        """The images, as they lie on disk."""
        ...

    def check(self) -> None:
        """Raise UserError where there are too few images for the study."""
        ...


class StudyPlan(Protocol):
    """All tasks of a study."""

    def tasks(self, stages: Sequence[str] = ...) -> list[Task]:
        """Give all tasks of the stages, by default of all; needs come before what needs them."""
        ...


class Study(ABC):
    """A study that `run_study` can run. It pickles as its settings, so that worker processes make it anew.

    Attributes:
        kind: `paper` or `federated`.
        settings: everything that the study depends on.
        workspace: this process's data and models.
        plan: all tasks, by what they make.
    """

    kind: str
    settings: StudySettings
    workspace: StudyData
    plan: StudyPlan

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone: another process opens its own data."""
        return {"settings": self.settings}

    @property
    @abstractmethod
    def threads(self) -> int:
        """CPU threads a process."""

    @abstractmethod
    def report(self, root: Path) -> Path:
        """Write a report of what has been measured so far; returns the path of its page."""

    @abstractmethod
    def probe(self) -> float:
        """Measure on a few steps of an untrained model how many seconds an image takes in training here."""


@dataclass(frozen=True)
class Job:
    """What every process at work on a study is told.

    Attributes:
        deadline: when to stop, as `time.time` has it.
        rate: seconds a unit of cost, for as long as nothing has been done here.
        workers: processes at work.
    """

    study: Study
    root: Path
    deadline: float
    rate: float
    workers: int

    def work(self, over: Callable[[], bool]) -> bool:
        """Do what is missing in this process; returns whether all was done in time."""
        return work_on(wanted(self.study), self.root, over=over, rate=self.rate, workers=self.workers)


def run_study(study: Study, *, only_plan: bool = False) -> int:
    """Do what is missing of a study, and write its report.

    Args:
        only_plan: show what there is to do, and do nothing.

    Returns:
        0 if all was done, 3 if time ran out.

    Raises:
        UserError: there is nothing to do, too few data, a folder of another study, or a worker that failed.
    """
    scope = study.settings.study
    deadline = time.time() + 60 * scope.minutes
    torch.set_num_threads(study.threads)
    study.workspace.check()
    root, workers, tasks = study_folder(study), number_of_workers(study), wanted(study)
    check_identity(study, root)
    if adopted := adopt(study.plan.tasks(), root):
        log.info("%d tasks are done: an earlier version made them with these settings", len(adopted))
    if not tasks and (scope.only != "*" or "report" not in scope.stages):
        raise UserError(f"study.only={scope.only} matches no task of {', '.join(scope.stages)}")
    check_needs(tasks, root)
    missing = [task for task in tasks if not task.is_done(root)]
    rate = _probed(study) if missing else 0.0
    print_plan(tasks, root, rate, workers)
    if only_plan:
        return 0
    finished = not missing
    if missing:
        job = Job(study, root, deadline, rate, workers)
        finished = job.work(lambda: time.time() > deadline) if workers == 1 else work_together(job)
    if "report" in scope.stages:
        log.info("writing the report")
        log.info(f"report: {study.report(root)}")
    if not finished:
        log.info("time is up: the same command continues")
    return 0 if finished else UNFINISHED


def wanted(study: Study) -> list[Task]:
    """Give the tasks of the wanted stages whose names match a pattern of `study.only`, those of the first one first."""
    scope = study.settings.study
    tasks = study.plan.tasks(scope.stages)
    found = {task.key: task for pattern in scope.only.split() for task in tasks if fnmatchcase(task.name, pattern)}
    return list(found.values())


def study_folder(study: Study) -> Path:
    """Give the folder of the study's files."""
    settings, suffix = study.settings, "" if study.kind == "paper" else f"-{study.kind}"
    name = settings.study.name or f"{settings.dataset}-{settings.scale}{suffix}"
    return state_home(settings.study.home) / "studies" / name


def number_of_workers(study: Study) -> int:
    """Take as many processes as asked for, else one on a GPU, else as many as the cores hold."""
    if study.settings.study.workers:
        return study.settings.study.workers
    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // study.threads)


def check_identity(study: Study, root: Path) -> None:
    """Write what the study is of, once; later runs must be of the same.

    Raises:
        UserError: naming what differs.
    """
    settings = study.settings
    about = settings.model_dump(include=set(IDENTITY))
    about |= {"order": settings.study.order, "data": study.workspace.dataset.fingerprint}
    about = json.loads(json.dumps(about))
    file = root / "study.json"
    if not file.exists():
        write_atomically(file, json.dumps(about, indent=1).encode())
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} was cut short ({error}): delete it, and the same command makes it again") from None
    defaults = json.loads(json.dumps(defaults_of(type(settings))))
    for key, value in about.items():
        if not agree(stored.get(key), value, defaults.get(key)):
            raise UserError(f"{root} is a study with {key}={stored.get(key)}, not {value}: choose another study.name")


def print_plan(tasks: Sequence[Task], root: Path, rate: float, workers: int) -> None:
    """Print what there is to do, by kind of task, and how long it may take."""
    table = Table(title=f"study {root.name}: {root}", title_justify="left")
    for column in ("part", "tasks", "done", "about"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rate = seconds_a_cost(tasks, root, rate)
    parts: dict[str, list[Task]] = {}
    for task in tasks:
        parts.setdefault("/".join(task.name.split("/")[:2]), []).append(task)
    total = 0.0
    for part, own in parts.items():
        missing = [task for task in own if not task.is_done(root)]
        seconds = rate * sum(task.cost for task in missing) / max(1, min(workers, len(missing)))
        total += seconds
        table.add_row(part, str(len(own)), str(len(own) - len(missing)), duration(seconds))
    Console(width=110).print(table)
    log.info(f"about {duration(total)} with {workers} process{'es' if workers > 1 else ''} at work")


def work_together(job: Job) -> bool:
    """Let several processes do what is missing; returns whether all was done in time.

    Raises:
        UserError: one of them failed; its own message has been logged.
    """
    os.environ.update(malloc.ENVIRONMENT)  # glibc reads it when a process starts
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(job, os.getpid())) for _ in range(job.workers)]
    for process in processes:
        process.start()

    def failed() -> bool:
        return any(process.exitcode not in (None, 0, UNFINISHED) for process in processes)

    try:
        while any(process.is_alive() for process in processes) and not failed():
            time.sleep(0.2)
        if failed():
            raise UserError("a worker failed (see above); what is done is kept, and the same command continues")
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return all(process.exitcode == 0 for process in processes)


def _probed(study: Study) -> float:
    """Measure how many seconds an image takes, and say so."""
    data = study.workspace
    what = f"{data.device.type}, {precision_on(data.device, data.precision)}, {torch.get_num_threads()} threads"
    log.info(f"measuring how fast this machine is ({what})")
    return study.probe()


def _worker(job: Job, parent: int) -> None:
    """Work until all is done, the time is over, or the parent process is gone."""
    set_up()
    torch.set_num_threads(job.study.threads)
    try:
        finished = job.work(lambda: time.time() > job.deadline or os.getppid() != parent)
    except (UserError, OSError) as error:
        log.error(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if finished else UNFINISHED)
