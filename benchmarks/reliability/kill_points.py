"""Kills a forget request at every durable step, and resumes it: `python -m benchmarks.reliability.kill_points`.

A durable step is an fsync, a rename, an unlink, or a BEGIN, INSERT or COMMIT of SQLite. Before and after each, a fork
of the process that carries the request out is ended with SIGKILL, and what is on disk then is kept. Another process
gives the same command there. Steps that find the same files are tried once. A kill inside SQLite's COMMIT is not tried.

There are three ways. `killed`: everything that was written is there. `power lost`: what was not synced is lost
(`power_loss.py` says how). `half a row`: the last row of metrics is cut in half. A journal that SQLite has not synced
may stay until its next write, and does not count as a file.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.reliability.power_loss import WAYS, Steps
from fedunlearn import cli
from fedunlearn.runs import report
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.ledger import State
from fedunlearn.runs.receipts import packages_sha256
from fedunlearn.runs.run import Run
from fedunlearn.runs.verifying import problems
from strategies import relabel

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a fork has that one alone
SMALL = (
    "rounds=3 clients=4 model.width=8 data.limit=120 data.test_limit=40 train.lr=0.02 train.client_head_steps=5 "
    "train.precision=fp32 train.threads=1 forget.rounds_until_completed=1 forget.budget=1"
)
STRATEGIES = {
    "ssd": "",
    "subset": "unlearn.rounds=1 unlearn.epochs=1",
    "relabel": "unlearn.rounds=1 unlearn.epochs=1",
    "gradients": "unlearn.steps=1",
    "ascent": "unlearn.epochs=1 unlearn.repair_rounds=1",
    "pga": "unlearn.epochs=1 unlearn.repair_rounds=1",
    "negate": "unlearn.repair_rounds=1",
    "federaser": "",
    "retrain": "",
    "leave": "",
}
RUN, HERE = "run", "--engine local --nodes 1"
FORGET = f"forget --client 3 --run {RUN} {HERE}"
UNLIKE = ("seconds", "busiest", "work", "worker_mebibytes", "server_mebibytes", "received_at", "due_at")
CHECKS = ("same weights", "applied once", "metrics right", "verified", "receipts", "same files")
COLUMNS = ("strategy", "way", "steps", "states", *CHECKS)


@dataclass(frozen=True)
class Outcome:
    """What a request has left behind."""

    weights: bytes
    states: list[str]
    rows: list[dict[str, Any]]
    wrong: list[str]
    receipts: int
    files: frozenset[str]


def main() -> None:
    """Print one table, a row for each strategy and way of being killed."""
    if os.environ | ONE_THREAD != os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | ONE_THREAD)
    p = argparse.ArgumentParser("python -m benchmarks.reliability.kill_points", description=__doc__)
    p.add_argument("--every", type=int, default=1, help="try every nth state alone")
    p.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    options = p.parse_args()
    torch.set_num_threads(1)
    draw_nothing()
    relabel.is_known_better = lambda *found: True  # after three rounds nobody is memorised, and nothing relabelled
    relabel.memorised_fraction = lambda *found: 1.0  # nor frozen
    found = [row for name in options.strategies for row in rows(name, options.every)]
    timing.table("of the states in which a request was killed, those after which all was well", COLUMNS, found)


def rows(strategy: str, every: int = 1) -> list[list[object]]:
    """Kill a strategy's request at its steps, and resume it in every nth state; gives a row for each way."""
    with tempfile.TemporaryDirectory(prefix="kill-points-") as folder:
        home, states, counted = (Path(folder) / name for name in ("home", "states", "counted"))
        words = f"run digits {SMALL} strategy={strategy} {STRATEGIES[strategy]} run={RUN} {HERE}"
        command(words, home)  # in this process: forks need not import anything
        packages_sha256()
        forked(lambda: undisturbed(home, states, counted))
        expected, steps, found = outcome(home), json.loads(counted.read_text()), []
        for way in WAYS:
            tried = sorted(states.glob(f"{way} *"))[::every]
            checks = [resumed(state, home, expected) for state in tried]
            found.append([strategy, way, steps[way], len(tried), *map(sum, zip(*checks, strict=True))])
            print(*found[-1], flush=True)
        return found


def undisturbed(home: Path, states: Path, counted: Path) -> None:
    """Carry the request out; forks of this process are killed meanwhile."""
    steps = Steps(home, states)
    steps.during(lambda: command(FORGET, home))
    counted.write_text(json.dumps(steps.counts()))


def resumed(state: Path, home: Path, expected: Outcome) -> list[bool]:
    """Give the same command after a kill, and compare what it leaves."""
    shutil.rmtree(home)
    state.rename(home)
    forked(lambda: command(FORGET, home))
    try:
        left = outcome(home)
    except Exception as error:
        print(f"{state.name}: {error}", flush=True)
        return [False] * len(CHECKS)
    unlike = sorted(left.files ^ expected.files)
    checks = [
        left.weights == expected.weights,
        left.states == ["RECEIVED", "COLLECTING", "APPLIED", "RECOVERING", "COMPLETED"],
        left.rows == expected.rows,
        not left.wrong,
        left.receipts == expected.receipts,
        not unlike,
    ]
    if not all(checks):
        bad = [name for name, good in zip(CHECKS, checks, strict=True) if not good]
        print(f"{state.name}: not {', '.join(bad)}; {[*left.wrong, *unlike]}", flush=True)
    return checks


def outcome(home: Path) -> Outcome:
    """Read what a request has left in a state folder."""
    run = Run.opened(runs_folder(home) / RUN)
    try:
        current, events = run.ledger.current(), run.ledger.events()
        assert current is not None
        return Outcome(
            (run.folder / "checkpoints" / current.checkpoint).read_bytes(),
            [event["state"] for event in events if event.get("state") in tuple(State)],
            [alike(row) for row in run.metrics()],
            list(problems(run)),
            sum("receipt" in event for event in events),
            frozenset(str(file.relative_to(home)) for file in home.rglob("*") if not file.name.endswith("-journal")),
        )
    finally:
        run.ledger.close()


def alike(value: Any) -> Any:
    """Leave out of a row what differs from one time to the next."""
    if isinstance(value, dict):
        return {name: alike(inner) for name, inner in value.items() if name not in UNLIKE}
    return value


def command(words: str, home: Path) -> int:
    """Give a command in this process, and return its status; what it says goes to a file beside the state folder."""
    os.environ["FEDUNLEARN_HOME"] = str(home)
    with (
        open(home.with_suffix(".log"), "a") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        try:
            cli.main(words.split())
        except SystemExit as ended:
            return int(ended.code or 0)


def forked(work: Callable[[], object]) -> None:
    """Do some work in a process of its own."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(process, 0)


def draw_nothing() -> None:
    """Leave the pictures out of reports: they take longer than all else."""
    report.split_figure = report.accuracy_figure = lambda *about: None  # pyright: ignore[reportAttributeAccessIssue]
    report.embedded = lambda figure: "data:,"


if __name__ == "__main__":
    main()
