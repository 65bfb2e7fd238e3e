"""What the page shows of runs, read from their folders: parts of HTML, made anew when something has changed."""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from fedunlearn.apps.serve.charts import Chart, chart
from fedunlearn.apps.serve.jobs import Job, Jobs
from fedunlearn.errors import UserError
from fedunlearn.runs import figures, verifying
from fedunlearn.runs.home import all_runs, find_run
from fedunlearn.runs.ledger import FORGOTTEN, OPEN, Request
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.overview import Glance, glance
from fedunlearn.runs.page import rendered
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.run import Run
from fedunlearn.runs.timeline import readable, timeline, what_follows
from fedunlearn.runs.verdicts import latest, verdicts

PACKAGE = "fedunlearn.apps.serve"
FILES = ("metrics.jsonl", "ledger.sqlite", "run.json", FOLDER, "report/index.html")  # a change of one shows
FIXED_COLOURS = {"retain clients": 0, "test": 1}

log = getLogger("fedunlearn")
Parts = dict[str, str]


@dataclass(frozen=True)
class Receipt:
    """A receipt as it lies there: its file, and what is wrong with it, if anything is."""

    file: str
    wrong: str


class Look:
    """Looks at the runs of a state folder; what has not changed is not read again.

    Args:
        home: state folder.
        jobs: what this page has started.
    """

    def __init__(self, home: Path, jobs: Jobs) -> None:
        self.home, self.jobs = home, jobs
        self._seen: dict[str, tuple[object, Any]] = {}

    def folder(self, name: str) -> Path:
        """Find the folder of a run.

        Raises:
            UserError: there is none of that name.
        """
        if name not in {folder.name for folder in all_runs(self.home)}:
            raise UserError(f"there is no run {name} here")
        return find_run(self.home, name)

    def listed(self) -> Parts:
        """Give the parts of the page of all runs, the newest first."""
        rows = [self._once(f"row {folder.name}", folder, lambda f=folder: _row(f)) for folder in all_runs(self.home)]
        return {"runs": rendered(PACKAGE, "runs.html.jinja", rows=rows[::-1])}

    def run(self, name: str) -> Parts:
        """Give the parts of the page of a run; of a damaged one what is wrong with it.

        Raises:
            UserError: there is none of that name.
        """
        folder = self.folder(name)
        return self._once(f"run {name}", folder, lambda: _parts(folder, self.jobs.of(name)))

    def _once(self, what: str, folder: Path, read: Callable[[], Any]) -> Any:
        """Read something of a run again only where its files, or what is at work on it, have changed."""
        now = (*map(_changed, (folder / file for file in FILES)), is_locked(folder, patience=0), int(time.time()) // 60)
        if job := self.jobs.of(folder.name):
            now += (_changed(job.log), job.status)
        if what not in self._seen or self._seen[what][0] != now:
            self._seen[what] = (now, read())
        return self._seen[what][1]


def stamp(html: str) -> str:
    """Give a short name of a part's content."""
    return hashlib.sha256(html.encode()).hexdigest()[:16]


def _changed(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError:
        return (0, 0)
    return about.st_mtime_ns, about.st_size


def _row(folder: Path) -> dict[str, Any]:
    """A line of the list."""
    found = glance(folder)
    row: dict[str, Any] = {"glance": found, "accuracy": None, "created": ""}
    if found.error:
        return row
    states = [f"{request.id} {request.state}" for request in found.requests if request.state in OPEN]
    row |= {"open": states, "created": readable(found.created)}
    try:
        run = Run.opened(folder)
    except UserError as error:
        return row | {"glance": Glance(folder.name, error=str(error))}
    with closing(run.ledger):
        now = latest(run.metrics())
    return row | {"accuracy": now.scores["test"]["class"] if now else None}


def _parts(folder: Path, job: Job | None) -> Parts:
    found = glance(folder)
    words: dict[str, Any] = {"glance": found, "job": job}
    if found.error:
        return {"now": rendered(PACKAGE, "now.html.jinja", **words)}
    try:
        run = Run.opened(folder)
    except UserError as error:
        return {"now": rendered(PACKAGE, "now.html.jinja", glance=Glance(folder.name, error=str(error)))}
    with closing(run.ledger):
        rows, requests = run.metrics(), run.ledger.requests()
        now = latest(rows)
        words |= {
            "config": run.config,
            "test": now.scores["test"]["class"] if now else None,
            "has_report": (folder / "report" / "index.html").is_file(),
            "measured": now.round if now else 0,
            "charts": charts(run, rows, requests),
            "cards": cards(run, rows, requests),
        }
    return {part: rendered(PACKAGE, f"{part}.html.jinja", **words) for part in ("now", "said", "curves", "requests")}


def charts(run: Run, rows: list[dict[str, Any]], requests: list[Request]) -> list[Chart]:
    """Lay out the curves of a run: accuracies of the test set, of retain and forgotten clients, and the loss."""
    asked: dict[int, str] = {}
    for request in requests:
        if request.state in FORGOTTEN:
            round_ = request.detail["round"]
            asked[round_] = f"{asked[round_]}, {request.id}" if round_ in asked else request.id
    accuracies, rounds = figures.curves(rows, "class", run.names()), run.config.rounds
    loss = {"loss": [(row["round"], float(row["loss"])) for row in rows if row["kind"] == "round" and "loss" in row]}
    others = [name for name in accuracies if name not in FIXED_COLOURS]
    colours = FIXED_COLOURS | {name: 2 + n % (len(figures.COLOURS) - 2) for n, name in enumerate(others)}
    return [
        chart("Class accuracy", accuracies, rounds=rounds, top=1.0, colours=colours, requests=asked),
        chart("Training loss", loss, rounds=rounds, colours={"loss": 0}, requests=asked),
    ]


def cards(run: Run, rows: list[dict[str, Any]], requests: list[Request]) -> list[dict[str, Any]]:
    """Gather what the page says of each request, the newest first."""
    events, late = run.ledger.events(), {request.id for request in run.ledger.overdue()}
    found = verdicts(requests, rows, label=run.config.strategy, names=run.names())
    said = {verdict.request: verdict for verdict in found}
    return [
        {
            "request": request,
            "who": run.named(request.clients),
            "verdict": said[request.id],
            "due": readable(request.detail["due_at"]),
            "is_open": request.state in OPEN,
            "is_late": request.id in late,
            "follows": what_follows(request),
            "gate": gate_of(request.detail.get("gate", {})),
            "timeline": timeline(request, events),
            "receipts": receipts(run, request, events),
        }
        for request in reversed(requests)
    ]


def gate_of(gate: Mapping[str, Any]) -> str:
    """Say what the gate found; nothing where it was not asked."""
    if not gate:
        return ""
    verdict = "It let the new model pass" if gate["passed"] else f"It refused the new model: {gate['reason']}"
    if not (gap := gate.get("gap")):
        return f"{verdict}."
    return f"{verdict}. Memorisation gap {gap[0]:+.3f} before, {gap[1]:+.3f} after, as the forget clients say."


def receipts(run: Run, request: Request, events: list[dict[str, Any]]) -> list[Receipt]:
    """Check every receipt of a request against its signatures and the ledger."""
    own = [event for event in events if event.get("of") == request.id and "receipt" in event]
    return [Receipt(event["receipt"], _wrong_with(run, event["receipt"], event["sha256"])) for event in own]


def _wrong_with(run: Run, name: str, sha256: str) -> str:
    try:
        data = (run.folder / FOLDER / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            return "it is not the one that was written"
        verifying.check_of_run(run, data, key=run.ledger.key)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except UserError as error:
        return str(error)
    return ""
