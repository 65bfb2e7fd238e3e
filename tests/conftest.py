import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedunlearn import config as configuration
from fedunlearn.apps.server_app import server_app
from fedunlearn.federation.client import Worker
from fedunlearn.runs.run import Run
from local_grid import LocalGrid

DIGITS = Path(__file__).parent.parent / "simulations" / "digits" / "conf"
SMALL = (
    "clients=4 rounds=3 data.limit=120 data.test_limit=40 train.lr=0.02 strategy=ssd unlearn.tune=fixed "
    "unlearn.alpha=2 unlearn.lambda_=0.5"
)


@pytest.fixture(autouse=True)
def quiet_flower():
    logging.getLogger("flwr").setLevel(logging.ERROR)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty state folder."""
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@dataclass
class Federate:
    """Runs the whole server app of a small digits federation in this process."""

    home: Path

    def __call__(self, overrides: str = "", *, nodes: int = 2, grid: LocalGrid | None = None) -> LocalGrid:
        grid = grid or LocalGrid(nodes)
        context = Context(1, 1, {}, RecordDict(), {"overrides": f"{SMALL} run=test {overrides}"})
        server_app(DIGITS)(grid, context)
        return grid

    def folder(self, name: str = "test") -> Path:
        return self.home / "runs" / name

    def run(self, name: str = "test") -> Run:
        """The run as it lies on disk, not held."""
        return Run.opened(self.folder(name))

    def state(self, name: str = "test") -> dict:
        """The current checkpoint's tensors."""
        run = self.run(name)
        worker = Worker(run.config)
        run.restore(worker.model)
        return worker.model.state_dict()

    def beside(self, name: str = "test") -> dict:
        """What the server keeps beside the current model."""
        run = self.run(name)
        return run.restore(Worker(run.config).model)[1]

    def requests(self, name: str = "test") -> list:
        return self.run(name).ledger.requests()

    def worker(self, overrides: str = "") -> Worker:
        """A worker of the same settings, with the initial weights."""
        return Worker(configuration.compose(DIGITS, f"{SMALL} run=test {overrides}"))


@pytest.fixture
def known(monkeypatch):
    """After two rounds no client is known better than unseen images are: `subset` would have nothing to do. Here it
    teaches."""
    monkeypatch.setattr("strategies.subset.is_known", lambda *found: True)


@pytest.fixture
def pictures(monkeypatch):
    """None in reports: they take longer to draw than these rounds to train. The tests of the report have them."""
    monkeypatch.setattr("fedunlearn.runs.report._embedded", lambda figure: "data:,")


@pytest.fixture
def federate(home, pictures):
    return Federate(home)


@pytest.fixture
def renewed(tmp_path, monkeypatch):
    """README's example of a strategy of one's own, where Python finds it."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    file = tmp_path / "renewed.py"
    file.write_text(re.search(r"```python\n(# renewed.py\n.*?)```", readme, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "renewed", raising=False)
    return file
