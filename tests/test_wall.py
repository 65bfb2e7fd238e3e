"""Who may touch whose data: no strategy needs the auditor, or a copy of the clients' images on the server."""

import ast
from pathlib import Path

import numpy as np
import pytest

from fedunlearn import Strategy, build
from fedunlearn.apps.client_app import resident
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.strategy import strategy_names
from fedunlearn.runs.ledger import State
from fedunlearn.runs.run import Run
from local_grid import LocalGrid
from naive import ONCE, SETTINGS, settings_of

REPOSITORY = Path(__file__).parent.parent
CLIENTS_FILES = ("train_images.npy", "train_labels.npy")


class TwoMachines(LocalGrid):
    """A grid whose clients have opened their images when they say whom they host; then the server's copy is deleted.

    Attributes:
        opened_by_server: names of the files of images and labels that the server has opened.
        deleted: files of the server's copy that are gone.
    """

    def __init__(self, store, monkeypatch):
        super().__init__(2)
        self.deliver = self.answer
        self.opened_by_server, self.deleted, self._store, self._at_a_client = [], [], store, False
        load = np.load

        def watched(file, *args, **kwargs):
            if isinstance(file, str | Path) and not self._at_a_client:
                self.opened_by_server.append(Path(file).name)
            return load(file, *args, **kwargs)

        monkeypatch.setattr(np, "load", watched)

    def answer(self, message):
        self._at_a_client = True
        try:
            reply = self.call(message)
        finally:
            self._at_a_client = False
        if messages.task_of(message).name == "identify" and not self.deleted:
            for file in CLIENTS_FILES:
                (store,) = self._store.iterdir()
                (store / file).unlink()
                self.deleted.append(file)
        return reply


@pytest.fixture
def machines(federate, monkeypatch):
    """Runs the rounds of an existing run without an auditor, and without the clients' images on the server."""
    resident.cache_clear()  # whoever opens the images anew, here or in a later test, opens this test's

    def go_on(name, rounds):
        grid = TwoMachines(federate.home / "data", monkeypatch)
        run = Run.opened(federate.folder(name))
        Rounds.assemble(run, auditor=None).start(grid, rounds)
        assert grid.deleted == [*CLIENTS_FILES]
        assert {*grid.opened_by_server} == {"test_images.npy", "test_labels.npy"}
        return run

    yield go_on
    resident.cache_clear()


@pytest.mark.parametrize("strategy", strategy_names())
@pytest.mark.usefixtures("memorised")
def test_every_strategy_forgets_without_the_clients_images_and_without_an_auditor(federate, machines, strategy):
    more = {
        "federaser": "unlearn.every=1",
        "subset": f"unlearn.epochs=1 {ONCE}",
        "relabel": f"unlearn.epochs=1 {ONCE}",
        "ssd": "unlearn.tune=auto",
    }
    settings = settings_of(strategy, more.get(strategy, ""))
    federate(f"{settings} rounds=1")
    federate.run().ledger.file([3])
    run = machines("test", 1)
    (request,) = run.ledger.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 1)
    last = run.metrics()[-1]
    assert last["round"] == 2
    for scores in (request.detail["before"], request.detail["after"], last):
        assert scores["forgotten"] == {}
        assert scores["retain"]["examples"] > 0
        assert scores["test"]["examples"] == 40
    asked = "class_counts" in request.detail["costs"]
    estimates = ("ascent", "gradients", "pga", "relabel", "ssd", "subset")
    assert asked == (strategy in estimates)  # what travels is counted


class Cheating(Strategy):
    """Looks at the clients' images on the server."""

    def forget(self, federation, forget):
        return {"images": len(build.open_dataset(federation.config).train.images)}


def test_a_strategy_that_looks_at_a_copy_of_the_clients_images_is_found_out(federate, machines):
    federate("rounds=1 strategy=test_wall:Cheating")
    federate.run().ledger.file([3])
    with pytest.raises(UserError, match=r"train_images\.npy is missing"):
        machines("test", 1)


def test_the_servers_data_is_the_held_out_images_alone(federate):
    pooled = federate.pooled(SETTINGS)
    server = ServerData(pooled.config)
    assert len(server.predict(server.model).class_labels) == 40
    kept = [value for value in vars(server).values() if isinstance(value, np.ndarray | tuple)]
    assert all(len(part) == 40 for split in kept for part in split)


def imported(path):
    """Every module and name that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SIDE_OF_THE_SERVER = [*sorted((REPOSITORY / "strategies").glob("*.py"))] + [
    REPOSITORY / "fedunlearn" / "federation" / f"{name}.py"
    for name in ("handle", "strategy", "tasks", "client", "server_data", "server_state", "nodes", "messages")
]


@pytest.mark.parametrize("file", SIDE_OF_THE_SERVER, ids=lambda file: f"{file.parent.name}.{file.stem}")
def test_no_strategy_and_nothing_that_it_is_given_imports_the_auditor(file):
    assert not {name for name in imported(file) if "auditor" in name.lower()}


def test_the_side_of_the_server_imports_no_images_of_clients():
    for name in ("handle", "server_data"):
        names = imported(REPOSITORY / "fedunlearn" / "federation" / f"{name}.py")
        assert not {n for n in names if n.endswith(("ClientRuntime", ".client", "slices_of"))}, name
