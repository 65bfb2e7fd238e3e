"""Runs of one more round, or of one request, from one base: what became of each."""

import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.reliability.array_damages import Damage
from benchmarks.reliability.federation import BASE, BASE_ROUNDS, FORGET, BadReplyGrid, Memory, Site, going_on
from benchmarks.reliability.outcomes import Examiner, Found, Model, impossible_figures, watched
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.run import Run

TRAINING = "training"
WORDS = {"subset": "unlearn.lr=0.4", "relabel": "unlearn.lr=0.2"}  # steps are few in so small a federation


class Bench:
    """Runs cases from one base.

    Args:
        home: state folder, where the base is made if it is not there.
    """

    def __init__(self, home: Path) -> None:
        self._home, self._memory, self._count = home, Memory(), 0
        if not (runs_folder(home) / "base" / "run.json").exists():
            with going_on(home, "base", BASE, BadReplyGrid(self._memory), rounds=BASE_ROUNDS):
                print("the base is trained", flush=True)
        base = Run.opened(runs_folder(home) / "base")
        self._auditor, server = Auditor(base.config), ServerData(base.config)
        self.examiner, self._restored_in = Examiner(self._auditor, server), server.model
        self.before: Model = self.examiner.model(self._params(base))
        self.model, self.pixels, self.examples = server.model, server.pixels, base.ledger.examples()
        base.ledger.close()

    def forget_replies(self) -> None:
        """Drop the remembered replies."""
        self._memory.replies.clear()

    def found(self, scenario: str, grid: BadReplyGrid) -> Found:
        """Carry out a scenario, and say what became of it."""
        self._count += 1
        name, found = f"case-{self._count}-{time.time_ns()}", Found()
        words = f"fork=base {_words(scenario)}"
        rounds = int(scenario == TRAINING)
        going = going_on(self._home, name, words, grid, rounds=rounds, auditor=self._auditor)
        with watched(found, grid.nodes), going as run:
            self._note(run, found)
        shutil.rmtree(runs_folder(self._home) / name, ignore_errors=True)
        return found

    def grid(self, site: Site | None = None, damage: Damage | None = None) -> BadReplyGrid:
        """Make a grid in which the reply at a place is damaged."""
        return BadReplyGrid(self._memory, site, damage)

    def _note(self, run: Run, found: Found) -> None:
        rows = [row for row in run.metrics() if row["kind"] != "round" or row["round"] > BASE_ROUNDS]
        requests = run.ledger.requests()
        found.impossible = list(impossible_figures([*rows, *(request.detail for request in requests)]))
        for request in requests:
            found.state, found.reason = request.state, request.detail.get("reason", "")
        found.model = self.examiner.model(self._params(run))

    def _params(self, run: Run) -> Any:
        return ServerState.from_tensors(*run.restore(self._restored_in, beside=None)).params


def _words(scenario: str) -> str:
    if scenario == TRAINING:
        return f"strategy=leave rounds={BASE_ROUNDS + 1}"
    request = f"forget.schedule={{{BASE_ROUNDS}:[{FORGET}]}} forget.attempts=1 forget.budget=0.1"
    return f"strategy={scenario} rounds={BASE_ROUNDS} {request} {WORDS.get(scenario, '')}".strip()
