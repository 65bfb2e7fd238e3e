"""What a step of a federated study does: a run of the real strategy over the real client app, in this process."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedunlearn.apps import client_app
from fedunlearn.apps.registry import strategy_of
from fedunlearn.errors import UserError
from fedunlearn.federation.client import Worker
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.requests import Forgetting
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs import checkpoint
from fedunlearn.runs.ledger import FORGOTTEN, Ledger
from fedunlearn.runs.run import BESIDE, Run
from fedunlearn.study.dag.steps import Desk, Step, log
from fedunlearn.study.federated.settings import TRACE
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.scores import Answers, Scores, score
from strategies import fed_eraser

RUN = "run"


@dataclass(frozen=True)
class Start:
    """A base run, and the round after which another goes on from it."""

    base: Step
    round: int


def federate(
    lab: Laboratory,
    desk: Desk,
    *,
    pipeline: str,
    strategy: str,
    seed: int,
    rounds: int,
    requests: Mapping[int, Sequence[int]],
    measured: Sequence[int],
    start: Start | None = None,
    kept: Sequence[int] = (),
) -> dict[str, Any]:
    """A federation of one node a client, from its beginning or from `start`, until round `rounds`.

    Args:
        requests: round -> clients that are forgotten after it.
        measured: rounds after which everything is measured (and the attack made), a request of that round served.
        kept: rounds whose checkpoints the step leaves.

    Returns:
        `scores` (rows with `round`, `forgotten` and every column), `forgets` (receipts), `rounds` (their costs),
        `files`.
    """
    asked = [client for clients in requests.values() for client in clients]
    with run_of(lab, desk, pipeline, strategy, seed, requests, start) as run:
        worker = Worker(run.config)
        work = strategy_of(strategy)(run, worker, log=partial(say, desk.step))

        def watch(round_: int) -> None:
            forgotten = run.ledger.clients_in(FORGOTTEN)
            gone = [client for client in asked if client in forgotten]
            if round_ in measured or round_ % TRACE == 0 or round_ in requests:
                found = lab.answers(work.model)
                columns = curve(found, gone or asked, worker)
                if round_ in measured:
                    columns |= score(found, gone or asked, seed=seed)
                run.record("score", round=round_, request=str(forgotten), forgotten=forgotten, **columns)
            if round_ in kept:
                checkpoint.save(desk.folder / file_of(round_), state_of(work))
            desk.tick(round_, rounds, "round")

        work.watch = watch
        if work.round < rounds or run.ledger.head() is None or not run.ledger.head().finished:
            if start and work.round == start.round and not run.ledger.clients_in(FORGOTTEN):
                columns = curve(lab.answers(work.model), asked, worker)
                run.record("score", round=work.round, request="before", forgotten=[], **columns)
            elif work.round:
                watch(work.round)  # whoever was stopped here may have committed the round without this
            logging.getLogger("flwr").setLevel(logging.ERROR)  # it says the number of every round
            work.start(LocalGrid(lab.settings.clients, client_app.app), rounds - work.round)
        if unserved := [r for r in run.ledger.requests() if r.state not in FORGOTTEN]:
            raise UserError(f"{desk.step.name}: {unserved[0].state}, {unserved[0].detail.get('reason', '')}")
        return outcome(desk, run, kept)


def say(step: Step, line: str) -> None:
    """Print what a strategy logs, but for a line a round: who is left out, and why; how requests went."""
    if not line.startswith("round ") or "left out" in line:
        log(f"{step.name}: {line}")


@contextmanager
def run_of(
    lab: Laboratory,
    desk: Desk,
    pipeline: str,
    strategy: str,
    seed: int,
    requests: Mapping[int, Sequence[int]],
    start: Start | None,
) -> Iterator[Run]:
    """The step's run: new, or as an interrupted process left it."""
    folder = desk.folder / RUN
    config = lab.settings.config(pipeline, strategy, seed)
    config = replace(config, run=RUN, forget=replace(config.forget, schedule={r: list(c) for r, c in requests.items()}))
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        run = Run(folder, config, ledger)
        if start and ledger.head() is None:
            copy_of(lab, desk, pipeline, run, start)
        elif head := ledger.head():
            run.delete_all_but(head.checkpoint)
        yield run
    finally:
        ledger.close()


def copy_of(lab: Laboratory, desk: Desk, pipeline: str, run: Run, start: Start) -> None:
    """Begin a run with a base's model, momentum and stored updates."""
    if run.config.strategy == "federaser":
        base = Run(start.base.folder(desk.root) / RUN, run.config, run.ledger)
        (run.folder / fed_eraser.FOLDER).mkdir(parents=True, exist_ok=True)
        for round_, client in fed_eraser.updates(base):
            if round_ <= start.round:
                there, here = (fed_eraser.stored(of, round_, client) for of in (base, run))
                here.unlink(missing_ok=True)  # of a copy that was stopped
                os.link(there, here)
    model = lab.new_model(pipeline, run.config.seed)
    file, name = desk.file(start.base, file_of(start.round)), file_of(start.round)
    sha256 = desk.result(start.base)["files"][name]
    beside = checkpoint.load(file, model, sha256=sha256, beside=BESIDE)
    run.commit(model, start.round, beside=beside)


def curve(found: Answers, clients: Sequence[int], worker: Worker) -> Scores:
    """Accuracies of everybody, what unseen images of the forgotten clients' mix get, and the losses of both."""
    counts = found.train.counts()
    others = sum((c for client, c in counts.items() if client not in clients), Counts())
    unseen = worker.predict_test()
    columns = {
        "others": others.class_accuracy,
        "id_others": others.client_accuracy,
        "test": unseen.total.class_accuracy,
    }
    for client in clients:
        mix = worker.class_mix([client])
        columns |= {
            f"client_{client}": counts[client].class_accuracy,
            f"unseen_{client}": unseen.expected_accuracy(mix),
            f"loss_{client}": counts[client].mean_loss,
        }
    return columns


def state_of(work: Forgetting) -> dict[str, Any]:
    """The model and what the server keeps beside it."""
    return work.model.state_dict() | work.server.beside()


def file_of(round_: int) -> str:
    """The name of a round's checkpoint."""
    return f"round-{round_:05d}.safetensors"


def outcome(desk: Desk, run: Run, kept: Sequence[int]) -> dict[str, Any]:
    """What the run has measured."""
    rows = run.metrics()
    return {
        "files": {file_of(round_): sha256(desk.folder / file_of(round_)) for round_ in kept},
        "scores": [row for row in rows if row["kind"] == "score"],
        "forgets": [row for row in rows if row["kind"] == "forget"],
        "rounds": {str(row["round"]): row["train"] for row in rows if row["kind"] == "round"},
    }


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
