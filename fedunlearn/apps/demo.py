"""A demonstration: a client withdraws from a run, beside the model that is retrained without it."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

from fedunlearn.apps import reports
from fedunlearn.apps.simulate import Resources, app_folder, simulate
from fedunlearn.composing import compose
from fedunlearn.config import state_home
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.log import ROUNDS
from fedunlearn.naming import as_command
from fedunlearn.runs import report
from fedunlearn.runs.home import log_of, open_run, runs_folder
from fedunlearn.runs.ledger import Request
from fedunlearn.runs.run import last_round

APP, CLIENT, REQUESTED, ROUNDS_IN_ALL = "digits", 7, 20, 30
BOTH = [
    "partition.dirichlet_alpha=0.1",  # the client owns nearly all images of one class: there is something to forget
    f"rounds={ROUNDS_IN_ALL}", "train.epochs=2", "train.server_momentum=0.5",  # by round 20 it is learned for good
]  # fmt: skip
WORDS = [*BOTH, f"forget.schedule={{{REQUESTED}:[{CLIENT}]}}"]
RETRAINED = [*BOTH, f"forget.schedule={{0:[{CLIENT}]}}", "strategy=leave"]

log = getLogger("fedunlearn")


def demonstrate(name: str, home: str = "") -> Path | None:
    """Train, forget and train on, while another process retrains without the client; then compare the two.

    Args:
        name: of the run; the other's ends in `-retrained`.
        home: state folder.

    Returns:
        The path of the report's page; None where the request failed.

    Raises:
        UserError: the other process failed; the file that is named says why.
    """
    own = [f"run={name}", *([f"home={home}"] if home else [])]
    from fedunlearn.apps.server_app import prepared, train

    config = prepared(compose(app_folder(APP) / "conf", [*WORDS, *own]), {})
    log.info(introduction(Auditor(config)))
    with retraining(f"{name}-retrained", config.home) as other:
        failed: list[Request] = []
        folder = runs_folder(state_home(config.home)) / name
        command = as_command("run", APP, *WORDS, *own, "--engine=local")
        with rounds_in_one_line():
            simulate(
                lambda grid: failed.extend(train(grid, config, [*WORDS, *own])),
                Resources("local", config.clients),
                way_on=lambda: f"{command} goes on after round {last_round(folder)}",
            )
        if failed:
            request = failed[0]
            log.error("request %s is %s: %s", request.id, request.state, request.detail.get("reason", ""))
            return None
        log.info("waiting for the model that is retrained without client %d", CLIENT)
        if other.wait():
            raise UserError(
                f"the run {name}-retrained failed: see {log_of(state_home(config.home), name + '-retrained')}"
            )
    return compared(name, config.home)


def introduction(auditor: Auditor) -> str:
    """Say who learns what, and who is going to leave."""
    counts = auditor.class_counts()
    mine = counts[CLIENT]
    most = int((mine / counts.sum(0)).argmax())
    return (
        f"{len(counts)} clients learn handwritten digits. Client {CLIENT} has {mine.sum()} of the {counts.sum():,} "
        f"images, among them {mine[most]} of the {counts[:, most].sum()} of class {most}.\n"
        f"It withdraws after round {REQUESTED}. Beside this run a model is retrained without it, to compare with."
    )


@contextmanager
def retraining(name: str, home: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that trains the run in which the client never takes part."""
    words = [*RETRAINED, f"run={name}", *([f"home={home}"] if home else [])]
    command = [sys.executable, "-m", "fedunlearn", "run", APP, *words, "--engine", "local"]
    file = log_of(state_home(home), name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextmanager
def rounds_in_one_line() -> Iterator[None]:
    """Show the lines of rounds as one, which each overwrites, on a terminal; elsewhere every fifth of them."""
    from rich.console import Console

    console, rounds = Console(stderr=True), getLogger(ROUNDS)
    status = console.status("")

    def show(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if console.is_terminal:
            status.update(text)
            return False
        return text.split("/")[0].endswith(("0", "5"))

    rounds.addFilter(show)
    try:
        with status:
            yield
    finally:
        rounds.removeFilter(show)


def compared(name: str, home: str) -> Path:
    """Write the run's report beside the retrained model's, say what it found, and give its path."""
    run, retrained = (open_run(each, home=home) for each in (name, f"{name}-retrained"))
    try:
        page = reports.write(run, [retrained])
        for verdict in report.comparison(run, [retrained]):
            log.info("%s. %s", verdict.title, verdict.text)
        return page
    finally:
        run.ledger.close()
        retrained.ledger.close()
