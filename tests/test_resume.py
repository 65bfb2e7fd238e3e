"""Runs that are stopped, killed or finished, and started again."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from command_line import command
from conftest import Federate, rewrite
from fedunlearn.cli import main
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.runs import checkpoint
from fedunlearn.runs.ledger import Ledger, State
from fedunlearn.runs.lock import lock
from local_grid import LocalGrid, equal, kinds

SCHEDULE = (
    "clients=2 data.limit=60 data.test_limit=20 train.client_head_steps=5 rounds=3 train.server_momentum=0.5 "
    "forget.schedule={1:[1]}"
)
STRATEGIES = {
    "ssd": "strategy=ssd unlearn.tune=fixed",
    "subset": "strategy=subset unlearn.rounds=1 unlearn.most_rounds=1",
}


class Killed:
    """What a kill would leave of a run: copies of its folder, of different content, taken while it goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stops: dict[str, list[str]] = {}  # name of the copy -> what was going on
        self._names: dict[str, str] = {}

    def here(self, stop: str) -> None:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != "lock")
        content = b"".join(path.name.encode() + path.read_bytes() for path in files)
        name = self._names.setdefault(hashlib.sha256(content).hexdigest(), f"killed-{len(self._names)}")
        if name not in self.stops:
            shutil.copytree(self.folder, self.folder.parent / name)
        self.stops.setdefault(name, []).append(stop)

    def at_messages(self, grid):
        def deliver(message):
            self.here(f"message {len(grid.sent)}, {kinds(grid)[-1]}")
            return grid.call(message)

        grid.deliver = deliver
        return grid

    def at_calls(self, patch, where, name, numbers):
        original, calls = getattr(where, name), []

        def called(*args, **kwargs):
            calls.append(1)
            if len(calls) in numbers:
                self.here(f"{name}, call {len(calls)}")
            return original(*args, **kwargs)

        patch.setattr(where, name, called)


def raising(error):
    def called(*about):
        raise error

    return called


def stopping(grid, when):
    """A grid in which the process is interrupted at the first message of which `when` holds."""

    def deliver(message):
        task = messages.task_of(message)
        if when(task):
            raise KeyboardInterrupt
        return grid.call(message)

    grid.deliver = deliver
    return grid


@pytest.fixture(scope="module", params=["subset", pytest.param("ssd", marks=pytest.mark.thorough)])
def whole(request, tmp_path_factory):
    """(strategy, final state, folder of runs, what kills at every message and around commits would leave there)."""
    words, home = STRATEGIES[request.param], tmp_path_factory.mktemp("whole")
    federate, killed = Federate(home, home), Killed(home / "runs" / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDUNLEARN_HOME", str(home))
        patch.setattr("fedunlearn.runs.report.embedded", lambda figure: "data:,")
        patch.setattr("strategies.relabel.is_known_better", lambda *found: True)
        patch.setattr("strategies.relabel.memorised_fraction", lambda *found: 1.0)
        if request.param == "ssd":  # of the other one it would be the same
            for where, name, calls in (
                (checkpoint, "save", (3, 4)),  # of the request, of the second round
                (Ledger, "commit", (3, 4)),
                (os, "fsync", range(4, 40, 5)),  # of keys, heads, checkpoints, metrics and receipts
            ):
                killed.at_calls(patch, where, name, calls)
        grid = federate(f"{SCHEDULE} {words} run=whole", grid=killed.at_messages(LocalGrid(2)))
        assert sum(len(stops) for stops in killed.stops.values()) >= len(grid.sent)
        return words, federate.server_state("whole").tensors(), home / "runs", killed.stops


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_message_or_commit_goes_on_to_the_same_weights(federate, whole, memorised):
    words, expected, runs, killed = whole
    assert len(killed) >= 6  # a start, three rounds, a request that is being applied and one that is applied
    shutil.copytree(runs.parent / "keys", federate.home / "keys")
    for name, stops in killed.items():
        shutil.copytree(runs / name, federate.folder(name))
        federate(f"{SCHEDULE} {words} run={name}")
        assert equal(federate.server_state(name).tensors(), expected), f"killed at {stops}"
        run = federate.run(name)
        assert len([event for event in run.ledger.events() if event.get("state") == State.APPLIED]) == 1
        assert run.ledger.signed_head() == run.ledger.kept_head()
        assert [row["round"] for row in run.metrics() if row["kind"] == "round"] == [1, 2, 3]
        assert len(list((run.folder / "checkpoints").iterdir())) == 1


def test_a_process_that_is_interrupted_can_go_on_itself(federate, whole, memorised, monkeypatch):
    words, expected, _, _ = whole
    original = Ledger.commit

    def at_the_requests_commit(self, *args, request=None, **detail):
        if request is not None:
            raise KeyboardInterrupt
        return original(self, *args, **detail)

    with pytest.raises(KeyboardInterrupt):  # between two nodes of a round
        federate(
            f"{SCHEDULE} {words}",
            grid=stopping(LocalGrid(2), lambda task: (task.name, task.clients) == ("train", [1])),
        )
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", at_the_requests_commit)
        with pytest.raises(KeyboardInterrupt):
            federate(f"{SCHEDULE} {words}")
    with pytest.raises(KeyboardInterrupt):
        federate(
            f"{SCHEDULE} {words}", grid=stopping(LocalGrid(2), lambda task: (task.name, task.round) == ("evaluate", 3))
        )
    federate(f"{SCHEDULE} {words}")
    assert equal(federate.server_state().tensors(), expected)


def test_a_request_that_came_in_a_round_that_is_repeated_still_waits_for_its_end(federate):
    def asking(grid, run, stop):
        def deliver(message):
            task = messages.task_of(message)
            if (task.name, task.round) == ("train", 1):
                if not federate.requests(run):
                    assert command("forget", "--client", "1", "--run", run) == 0
                elif stop:
                    raise KeyboardInterrupt
            return grid.call(message)

        grid.deliver = deliver
        return grid

    federate("clients=2 rounds=2 run=whole", grid=asking(LocalGrid(2), "whole", stop=False))
    with pytest.raises(KeyboardInterrupt):
        federate("clients=2 rounds=2 run=stopped", grid=asking(LocalGrid(2), "stopped", stop=True))
    federate("clients=2 rounds=2 run=stopped")
    assert federate.requests("stopped")[0].detail["round"] == 1
    assert equal(federate.state("stopped"), federate.state("whole"))


def test_who_asked_in_a_round_that_is_not_repeated_trains_no_more(federate):
    federate("rounds=1 forget.rounds_until_completed=2")
    ledger = federate.run().ledger
    ledger.file([3], not_before=2)
    ledger.close()
    grid = federate("rounds=1")
    assert [kind for kind in kinds(grid) if kind[0] == "train"] == [("train", 2)] * 2 + [("train", 3)] * 2
    assert not [kind for kind in kinds(grid, client=3) if kind[0] == "train"]
    (request,) = federate.requests()
    assert (request.detail["round"], request.detail["completed_round"]) == (1, 3)


def test_a_request_that_recovers_ends_with_the_runs_rounds_also_when_it_was_stopped(federate):
    settings = "rounds=2 forget.schedule={1:[2]} forget.rounds_until_completed=5"
    with pytest.raises(KeyboardInterrupt):
        federate(settings, grid=stopping(LocalGrid(2), lambda task: (task.name, task.round) == ("train", 2)))
    federate(settings)
    (request,) = federate.requests()
    assert (federate.run().ledger.current().round, request.detail["completed_round"]) == (2, 2)


def test_while_a_finished_run_goes_on_it_takes_requests(federate):
    federate.shared("rounds=1", name="test")
    assert federate.run().ledger.current().finished
    federate.run().ledger.file([3])
    grid, finished = LocalGrid(2), []

    def deliver(message):
        finished.append(federate.run().ledger.current().finished)
        return grid.call(message)

    grid.deliver = deliver
    federate("rounds=1", grid=grid)
    assert finished
    assert not any(finished)


def test_what_a_crash_left_beside_the_checkpoint_is_deleted_and_the_timeout_may_change(federate):
    federate.shared("rounds=1", name="test")
    for name in ("round-00000.safetensors", ".new-half-written"):
        (federate.folder() / "checkpoints" / name).write_bytes(b"of a model that knew the client")
    for file in (federate.folder() / ".new-run.json-x1", federate.home / "heads" / ".new-test.json-x1"):
        file.touch()
    federate("rounds=1 timeout=7200")
    assert not list(federate.home.rglob(".new-*"))
    assert [file.name for file in (federate.folder() / "checkpoints").iterdir()] == ["round-00001.safetensors"]


def test_a_request_whose_process_ended_before_its_receipt_gets_it_with_the_same_command(federate, monkeypatch):
    federate.shared("rounds=1", name="test")
    ask = "forget", "--client", "1", "--run", "test", "--engine", "local"

    class KilledError(BaseException):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("fedunlearn.runs.receipts.write_due", raising(KilledError))
        with pytest.raises(KilledError):
            main(list(ask))
    assert federate.requests()[0].state == State.COMPLETED
    assert command(*ask) == 0
    assert [file.name for file in (federate.folder() / "receipts").glob("*.json")] == ["r1.json"]


def test_a_finished_run_is_left_as_it_is(federate, capsys):
    federate.shared("rounds=1", name="test")
    before = federate.server_state().tensors()
    grid = federate("rounds=1")
    assert equal(federate.server_state().tensors(), before)
    assert "train" not in [kind for kind, _ in kinds(grid)]
    assert "report:" in capsys.readouterr().err


def test_a_run_keeps_its_settings_its_data_and_its_holder(federate):
    federate.shared("rounds=1", name="test")
    with pytest.raises(UserError, match="run test has seed=0, not 2: use another run name"):
        federate("rounds=1 seed=2")
    with pytest.raises(UserError, match=r"run test has train\.lr=0.02, not 0.123"):
        federate("rounds=1 train={lr:0.123}")
    with lock(federate.folder()), pytest.raises(UserError, match="run test is locked by process"):
        federate("rounds=1")
    rewrite(federate.folder(), data=federate.run().about()["data"] | {"1": "of other images"})
    with pytest.raises(UserError, match=r"was trained on other data \(other images of client 1\)"):
        federate("rounds=1")


def test_a_run_whose_folder_was_renamed_goes_on_under_its_new_name(federate):
    federate.shared("rounds=1", name="test")
    federate.folder().rename(federate.folder("renamed"))
    federate("rounds=1 run=renamed")
    assert not federate.folder().exists()


def test_a_damaged_checkpoint_is_named(federate):
    federate.shared("rounds=1", name="test")
    (file,) = (federate.folder() / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"round-00001.safetensors was cut short or changed"):
        federate("rounds=1")


def test_a_run_that_goes_on_after_a_class_has_left_has_its_predictions(federate):
    words = "clients=2 data.limit=60 data.test_limit=20 train.client_head_steps=5 strategy=leave"
    for name in ("whole", "test"):
        federate(f"{words} rounds=1 run={name}", nodes=1)
        run = federate.run(name)
        run.request([], selection=Selection.by(classes=[7]))
        run.ledger.close()
    federate(f"{words} rounds=3 run=whole", nodes=1)
    with pytest.raises(KeyboardInterrupt):
        federate(f"{words} rounds=3", grid=stopping(LocalGrid(1), lambda task: task.round == 3))
    federate(f"{words} rounds=3", nodes=1)
    assert federate.server_state("whole").predictions.keys() == {"2", "3"}
    assert equal(federate.server_state().tensors(), federate.server_state("whole").tensors())
