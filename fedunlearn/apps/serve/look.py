"""What the page shows of runs, read from their folders: parts of HTML, made anew when something has changed."""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from fedunlearn.apps.serve.charts import Chart, chart
from fedunlearn.apps.serve.jobs import Job, Jobs
from fedunlearn.errors import UserError
from fedunlearn.runs import figures, verifying
from fedunlearn.runs.home import all_runs, is_run, runs_folder
from fedunlearn.runs.ledger import FORGOTTEN, OPEN, Request
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.overview import UNUSABLE, Glance, damaged, glance
from fedunlearn.runs.page import encoded, rendered
from fedunlearn.runs.receipts import FOLDER
from fedunlearn.runs.run import Run
from fedunlearn.runs.timeline import readable, timeline, what_follows
from fedunlearn.runs.verdicts import newest, verdicts

PACKAGE = "fedunlearn.apps.serve"
FILES = ("metrics.jsonl", "ledger.sqlite", "run.json", FOLDER, "report/index.html")  # a change of one shows
OVERDUE_SECONDS = 3600  # after which a request that is overdue shows at the latest
FIXED_COLOURS = {"retain clients": 0, "test": 1}

Parts = dict[str, str]
Valid = set[tuple[str, str]]
T = TypeVar("T")


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
        self._seen: dict[tuple[str, str], tuple[object, Any]] = {}
        self._locks: dict[tuple[str, str], Lock] = {}
        self._valid: Valid = set()

    def folder(self, name: str) -> Path:
        """Find the folder of a run.

        Raises:
            UserError: there is none of that name.
        """
        if not is_run(self.home, name):
            raise UserError(f"there is no run {name} here")
        return runs_folder(self.home) / name

    def listed(self) -> Parts:
        """Give the parts of the page of all runs, the newest first."""
        rows = [self._once("row", folder, _row, _damaged_row) for folder in all_runs(self.home)]
        return {"runs": rendered(PACKAGE, "runs.html.jinja", rows=rows[::-1])}

    def run(self, name: str) -> Parts:
        """Give the parts of the page of a run; of a damaged one what is wrong with it.

        Raises:
            UserError: there is none of that name.
        """
        folder = self.folder(name)
        return self._once("run", folder, lambda folder: _parts(folder, self.jobs.of(name), self._valid), _damaged_parts)

    def _once(self, what: str, folder: Path, read: Callable[[Path], T], unread: Callable[[Glance], T]) -> T:
        """Read something of a run again only where its files, or what is at work on it, have changed.

        Args:
            what: is read.
            folder: of the run.
            read: reads it.
            unread: gives what stands for it where the run is damaged.
        """
        key = (what, folder.name)
        try:
            with self._locks.setdefault(key, Lock()):  # whoever looks at the same moment waits, and reads nothing again
                now = self._signs(folder)
                if key not in self._seen or self._seen[key][0] != now:
                    self._seen[key] = (now, read(folder))
                return self._seen[key][1]
        except UNUSABLE as error:
            return unread(damaged(folder, error))

    def _signs(self, folder: Path) -> tuple[object, ...]:
        """Give what changes where a run does."""
        files = map(_changed, (folder / file for file in FILES))
        signs = (*files, is_locked(folder, patience=0), int(time.time()) // OVERDUE_SECONDS)
        job = self.jobs.of(folder.name)
        return (*signs, _changed(job.log), job.status) if job else signs


def stamp(html: str) -> str:
    """Give a short name of a part's content."""
    return hashlib.sha256(encoded(html)).hexdigest()[:16]


def _changed(file: Path) -> tuple[int, int]:
    try:
        about = file.stat()
    except OSError:
        return (0, 0)
    return about.st_mtime_ns, about.st_size


def _damaged_row(found: Glance) -> dict[str, Any]:
    return {"glance": found, "accuracy": None, "created": "", "has_page": _is_text(found.run)}


def _is_text(name: str) -> bool:
    """Whether an address can have the name of a folder."""
    return not re.search("[\ud800-\udfff]", name)


def _row(folder: Path) -> dict[str, Any]:
    """A line of the list."""
    found = glance(folder)
    if not found.error and not _is_text(folder.name):
        found = Glance(folder.name, error="a page needs a name that is text: rename the folder")
    row = _damaged_row(found)
    if found.error:
        return row
    states = [f"{request.id} {request.state}" for request in found.requests if request.state in OPEN]
    row |= {"open": states, "created": readable(found.created)}
    run = Run.opened(folder)
    with closing(run.ledger):
        now = newest(run.metrics())
    return row | {"accuracy": now.scores["test"]["class"] if now else None}


def _parts(folder: Path, job: Job | None, valid: Valid) -> Parts:
    found = glance(folder)
    if found.error:
        return _damaged_parts(found)
    words: dict[str, Any] = {"glance": found, "job": job}
    run = Run.opened(folder)
    with closing(run.ledger):
        rows, requests = run.metrics(), run.ledger.requests()
        now = newest(rows)
        words |= {
            "config": run.config,
            "test": now.scores["test"]["class"] if now else None,
            "has_report": (folder / "report" / "index.html").is_file(),
            "measured": now.when if now else "",
            "charts": charts(run, rows, requests),
            "cards": cards(run, rows, requests, valid),
        }
    return {part: rendered(PACKAGE, f"{part}.html.jinja", **words) for part in ("now", "said", "curves", "requests")}


def _damaged_parts(found: Glance) -> Parts:
    return {"now": rendered(PACKAGE, "now.html.jinja", glance=found)}


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


def cards(run: Run, rows: list[dict[str, Any]], requests: list[Request], valid: Valid) -> list[dict[str, Any]]:
    """Gather what the page says of each request, the newest first.

    Args:
        run: that is open.
        rows: of its metrics.
        requests: of its ledger.
        valid: receipts that are known to be, as for `receipts`.
    """
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
            "follows": what_follows(request, run.folder, run.ledger.covering(request.clients)),
            "can_be_accepted": can_be_accepted(run, request),
            "gate": gate_of(request.detail.get("gate", {})),
            "timeline": timeline(request, events),
            "receipts": receipts(run, request, events, valid),
        }
        for request in reversed(requests)
    ]


def can_be_accepted(run: Run, request: Request) -> bool:
    """Say whether somebody may take the model that the gate has refused."""
    try:
        return bool(run.ledger.acceptable(request.id))
    except UserError:
        return False


def gate_of(gate: Mapping[str, Any]) -> str:
    """Say what the gate found; nothing where it was not asked."""
    if not gate:
        return ""
    verdict = "It let the new model pass" if gate["passed"] else f"It refused the new model: {gate['reason']}"
    if not (gap := gate.get("gap")):
        return f"{verdict}."
    return f"{verdict}. Memorisation gap {gap[0]:+.3f} before, {gap[1]:+.3f} after, as the forget clients say."


def receipts(run: Run, request: Request, events: list[dict[str, Any]], valid: Valid) -> list[Receipt]:
    """Check every receipt of a request against its signatures and the ledger.

    Args:
        run: that is open.
        request: of its ledger.
        events: of its ledger.
        valid: receipts that were checked before, by the ledger's key and their SHA-256; what is found to be valid is
            added. The events that they are about never change.
    """
    own = [event for event in events if event.get("of") == request.id and "receipt" in event]
    return [Receipt(event["receipt"], _wrong_with(run, event["receipt"], event["sha256"], valid)) for event in own]


def _wrong_with(run: Run, name: str, sha256: str, valid: Valid) -> str:
    try:
        data = (run.folder / FOLDER / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            return "it is not the one that was written"
        if (run.ledger.key, sha256) not in valid:
            verifying.check_of_run(run, data, key=run.ledger.key)
            valid.add((run.ledger.key, sha256))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except UserError as error:
        return str(error)
    return ""
