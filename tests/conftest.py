import json
import logging
import shutil
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedunlearn.apps.server_app import server_app
from fedunlearn.composing import compose
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.runs.home import write_about
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run
from local_grid import LocalGrid
from naive import Pooled

DIGITS = Path(__file__).parent.parent / "simulations" / "digits" / "conf"
SMALL = "clients=4 rounds=3 data.limit=120 data.test_limit=40 train.lr=0.02 train.client_head_steps=20"
SMALL += " forget.gate=false"  # of models that know nothing yet, chance decides whether they pass
FIXED_SSD = "strategy=ssd unlearn.tune=fixed unlearn.alpha=2 unlearn.lambda_=0.5"  # where a test names no strategy


def pytest_collection_modifyitems(items):
    """The longest first, so that none of them is what all other workers wait for in the end."""
    items.sort(key=lambda item: next((n for n, mark in enumerate(("ray", "slow")) if item.get_closest_marker(mark)), 2))


@pytest.fixture(autouse=True)
def quiet_flower():
    logging.getLogger("flwr").setLevel(logging.ERROR)
    logging.getLogger("fedunlearn").propagate = False  # as commands leave it: so `caplog` hears the first test too


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty state folder."""
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def digits():
    """The configuration folder of the app."""
    return DIGITS


def small(overrides: str = "") -> str:
    """The settings of a small digits federation, with `overrides` on top."""
    strategy = "" if "strategy=" in overrides else f"{FIXED_SSD} "
    return f"{SMALL} {strategy}run=test {overrides}"


def rewrite(folder: Path, **changes) -> None:
    """Have the run itself say something else in its `run.json`."""
    ledger = Ledger(folder / "ledger.sqlite")
    write_about(folder, ledger, json.loads((folder / "run.json").read_text()) | changes)
    ledger.close()


@dataclass
class Federate:
    """Runs the whole server app of a small digits federation in this process."""

    home: Path
    kept: Path

    def __call__(self, overrides: str = "", *, nodes: int = 2, grid: LocalGrid | None = None) -> LocalGrid:
        grid = grid or LocalGrid(nodes)
        server_app(DIGITS)(grid, Context(1, 1, {}, RecordDict(), {"overrides": small(overrides)}))
        return grid

    def shared(self, overrides: str, *, nodes: int = 2, name: str = "before") -> None:
        """A run that tests look at or go on from with `fork=before`; the first of them in this session makes it."""
        kept = self.kept / sha256(f"{small(overrides)} {nodes}".encode()).hexdigest()
        if not kept.exists():
            self(f"{overrides} run={name}", nodes=nodes)
            for folder in ("keys", "heads"):
                shutil.copytree(self.home / folder, kept / folder)
            shutil.copytree(self.folder(name), kept / "run")
        elif not self.folder(name).exists():
            for folder in ("keys", "heads"):
                shutil.copytree(kept / folder, self.home / folder, dirs_exist_ok=True)
            shutil.copytree(kept / "run", self.folder(name))

    def folder(self, name: str = "test") -> Path:
        return self.home / "runs" / name

    def run(self, name: str = "test") -> Run:
        """The run as it lies on disk, not held."""
        return Run.opened(self.folder(name))

    def server_state(self, name: str = "test") -> ServerState:
        """What the current checkpoint says: the model, and what the server keeps beside it."""
        run = self.run(name)
        return ServerState.from_tensors(*run.restore(ServerData(run.config).model, beside=None))

    def state(self, name: str = "test") -> dict:
        """The current model's tensors."""
        return self.server_state(name).params

    def requests(self, name: str = "test") -> list:
        return self.run(name).ledger.requests()

    def pooled(self, overrides: str = "") -> Pooled:
        """All clients' data under the same settings, with the initial weights."""
        return Pooled(compose(DIGITS, small(overrides)))


@pytest.fixture
def memorised(monkeypatch):
    """After two rounds no client is memorised: relabelling would have nothing to do. Here it relabels and freezes."""
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    monkeypatch.setattr("strategies.relabel.memorised_fraction", lambda *found: 1.0)


@pytest.fixture
def pictures(monkeypatch):
    """None in reports: they take longer to draw than these rounds to train. The tests of the report have them."""
    for name in ("split_figure", "accuracy_figure"):
        monkeypatch.setattr(f"fedunlearn.runs.report.{name}", lambda *about: None)
    monkeypatch.setattr("fedunlearn.runs.report.embedded", lambda figure: "data:,")


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Where runs lie that several tests share."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def federate(home, pictures, kept):
    return Federate(home, kept)


RENEWED = '''
from pydantic import Field

from fedunlearn import Settings as CheckedSettings
from fedunlearn import Strategy, Update, client_task


class Renewed(Strategy):
    """A stage starts anew from the run's initial weights, and the retain clients train it alone."""

    class Settings(CheckedSettings):
        stage: int = Field(default=3, ge=0, le=3, description="that starts anew")
        lr: float = Field(default=0.01, ge=0, description="of the retain clients' round")

    @client_task(kind="train")
    @staticmethod
    def train_stage(client, model, settings, *, prefix):
        """Its model's update, of the stage that starts anew."""
        counts = client.fit(model, lr=settings.lr)
        changes = client.changes(model)
        return Update({n: v if n.startswith(prefix) else 0 * v for n, v in changes.items()}, client.examples, counts)

    def forget(self, federation, forget):
        prefix = f"stages.{self.settings.stage}."
        fresh = federation.server.new_model().state_dict()
        stage = {name: value for name, value in fresh.items() if name.startswith(prefix)}
        with federation.editing() as model:
            model.load_state_dict(stage, strict=False)
        federation.apply(federation.run(self.train_stage, on=federation.retain, prefix=prefix).mean())
        return {"renewed": len(stage)}
'''


@pytest.fixture
def renewed(tmp_path, monkeypatch):
    """A strategy of one's own in one file outside the repository, `renewed:Renewed`, where Python finds it."""
    from fedunlearn.federation.strategy import strategy_class

    file = tmp_path / "own" / "renewed.py"
    file.parent.mkdir()
    file.write_text(RENEWED)
    monkeypatch.syspath_prepend(file.parent)
    strategy_class.cache_clear()
    yield file
    sys.modules.pop("renewed", None)
    strategy_class.cache_clear()
