"""The command line of the study: what is missing of it is done, by one process or several."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fedunlearn import malloc as memory
from fedunlearn.config import state_home
from fedunlearn.errors import UserError
from fedunlearn.nn.precision import precision_on
from fedunlearn.runs import checkpoint
from fedunlearn.runs.report import duration
from fedunlearn.study.dag.steps import Step, check_needs, log, seconds_a_cost, work_on
from fedunlearn.study.pooled import report
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.settings import Settings, load
from fedunlearn.study.pooled.training import Training

UNFINISHED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if all was done, 2 after an error, 3 if time ran out, 130 if interrupted."""
    p = argparse.ArgumentParser("python -m fedunlearn.study", description="Make the paper's study, or what is missing.")
    p.add_argument(
        "settings", nargs="*", help="as dataset=cifar10 scale=laptop 'study.stages=[train]' search.trials=20"
    )
    p.add_argument("--plan", action="store_true", help="only show what would be done")
    options = p.parse_args(arguments)
    try:
        return run(load_either(options.settings), only_plan=options.plan)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


def load_either(words: Sequence[str]) -> Any:
    """The settings of a pooled study, or of a federated one where `federated=true` is among the words."""
    if "federated=true" not in words:
        return load(words)
    from fedunlearn.study.federated import settings

    return settings.load(words)


def plan_of(settings: Any, lab: Laboratory) -> Any:
    """The plan of either; only that of a federated study needs Flower."""
    if isinstance(settings, Settings):
        return Plan(settings, lab)
    from fedunlearn.study.federated.plan import Plan as FederatedPlan

    return FederatedPlan(settings, lab)


def write_report(plan: Any, root: Path) -> Path:
    """The report of either."""
    if isinstance(plan, Plan):
        return report.write(plan, root)
    from fedunlearn.study.federated import report as federated_report

    return federated_report.write(plan, root)


def run(settings: Any, *, only_plan: bool = False) -> int:
    """Do what is missing of the study, and write its report."""
    deadline = time.time() + 60 * settings.study.minutes
    torch.set_num_threads(settings.learning.threads)
    lab = Laboratory(settings)
    lab.check()
    root, workers = study_folder(settings), number_of_workers(settings)
    hold_to(root, settings, lab)
    steps = plan_of(settings, lab).steps()
    if not steps and (settings.study.only != "*" or "report" not in settings.study.stages):
        raise UserError(f"study.only={settings.study.only} matches no step of {', '.join(settings.study.stages)}")
    check_needs(steps, root)
    rate = seconds_an_image(lab) if any(not step.is_done(root) for step in steps) else 0.0
    print_plan(steps, root, rate, workers)
    if only_plan:
        return 0
    finished = all(step.is_done(root) for step in steps)
    if not finished and workers == 1:
        finished = work_on(steps, root, over=lambda: time.time() > deadline, rate=rate, workers=1)
    elif not finished:
        finished = work_together(settings, root, deadline, rate, workers)
    if "report" in settings.study.stages:
        log(f"report: {write_report(plan_of(settings, lab), root)}")
    if not finished:
        log("time is up: the same command continues")
    return 0 if finished else UNFINISHED


def study_folder(settings: Any) -> Path:
    """Where the study's files are."""
    kind = "" if isinstance(settings, Settings) else "-federated"
    name = settings.study.name or f"{settings.dataset}-{settings.scale}{kind}"
    return state_home(settings.study.home) / "studies" / name


def number_of_workers(settings: Any) -> int:
    """As asked, else one on a GPU, else as many as the cores hold."""
    if settings.study.workers:
        return settings.study.workers
    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // settings.learning.threads)


def hold_to(root: Path, settings: Any, lab: Laboratory) -> None:
    """Write what the study is of, once; later runs must be of the same.

    Raises:
        UserError: naming what differs.
    """
    keys = ("dataset", "scale", "clients", "partition", "model")
    about = {key: value for key, value in asdict(settings).items() if key in keys}
    about = json.loads(json.dumps(about | {"order": settings.study.order, "data": lab.dataset.fingerprint}))
    file = root / "study.json"
    if not file.exists():
        checkpoint.write_atomically(file, json.dumps(about, indent=1).encode())
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} was cut short ({error}): delete it, and the same command makes it again") from None
    for key, value in about.items():
        if stored.get(key) != value:
            raise UserError(f"{root} is a study with {key}={stored.get(key)}, not {value}: choose another study.name")


def seconds_an_image(lab: Laboratory) -> float:
    """What an image takes in training, measured on a few steps of an untrained model."""
    recipe = lab.settings.recipe("ce_dl")
    what = f"{lab.device.type}, {precision_on(lab.device, recipe.precision)}, {torch.get_num_threads()} threads"
    log(f"looking how fast this machine is ({what})")
    some = lab.pool.train.all()[: 4 * recipe.batch_size]
    training = Training(lab.new_model("ce_dl", 0), lab.pool.train, some, replace(recipe, warmup=0.0), 0)
    training.run_epoch()
    training.run_epoch()
    return training.history[-1][-1] / len(some)


def print_plan(steps: Sequence[Step], root: Path, rate: float, workers: int) -> None:
    """What there is to do, by kind of step, and how long it may take."""
    table = Table(title=f"study {root.name}: {root}", title_justify="left")
    for column in ("part", "steps", "done", "about"):
        table.add_column(column, justify="left" if column == "part" else "right")
    rate = seconds_a_cost(steps, root, rate)
    parts: dict[str, list[Step]] = {}
    for step in steps:
        parts.setdefault("/".join(step.name.split("/")[:2]), []).append(step)
    total = 0.0
    for part, own in parts.items():
        missing = [step for step in own if not step.is_done(root)]
        seconds = rate * sum(step.cost for step in missing) / workers
        total += seconds
        table.add_row(part, str(len(own)), str(len(own) - len(missing)), duration(seconds))
    Console(width=110).print(table)
    log(f"about {duration(total)} with {workers} process{'es' if workers > 1 else ''} at work")


def work_together(settings: Any, root: Path, deadline: float, rate: float, workers: int) -> bool:
    """Let several processes do what is missing; whether all was done in time.

    Raises:
        UserError: one of them failed; its own message has been printed.
    """
    os.environ.update(memory.ENVIRONMENT)  # glibc reads it when a process starts
    context = multiprocessing.get_context("spawn")
    arguments = (settings, root, deadline, rate, workers, os.getpid())
    processes = [context.Process(target=_worker, args=arguments) for _ in range(workers)]
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


def _worker(settings: Any, root: Path, deadline: float, rate: float, workers: int, parent: int) -> None:
    def over() -> bool:
        return time.time() > deadline or os.getppid() != parent

    torch.set_num_threads(settings.learning.threads)
    try:
        steps = plan_of(settings, Laboratory(settings)).steps()
        finished = work_on(steps, root, over=over, rate=rate, workers=workers)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if finished else UNFINISHED)
