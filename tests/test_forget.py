"""Requests from outside a run: the command, and the door of `Run` that it goes through."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from pydantic import Field

from command_line import command
from fedunlearn.apps import asking
from fedunlearn.apps.server_app import prepared
from fedunlearn.config import Config
from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.errors import UserError
from fedunlearn.federation.strategy import Strategy, chosen
from fedunlearn.runs import door
from fedunlearn.runs.home import open_run
from fedunlearn.runs.ledger import State
from fedunlearn.runs.lock import LockedError, lock
from local_grid import LocalGrid, equal

FORGOTTEN = "forget.schedule={2:[3]}"


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(door, "POLL_SECONDS", 0.05)


@pytest.fixture
def finished(federate):
    """A run of one round that nobody holds."""
    federate.shared("rounds=1", name="test")
    return federate


def at_training(grid, ask):
    """Call `ask` at the first message of training."""
    asked = []

    def deliver(message):
        if message.metadata.message_type == "train" and not asked:
            asked.append(1)
            ask()
        return grid.call(message)

    grid.deliver = deliver
    return grid


def test_bad_input_gets_one_line_and_status_2(finished, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = finished.folder().joinpath("ledger.sqlite").read_bytes()
    cases = {
        ("--client", "4"): "client 4 is not in 0..3",
        ("--client", "-1"): "client -1 is not in 0..3",
        ("--client=--3",): "client '--3' is not a whole number",
        (f"--client={'1' * 5000}",): f"client '{'1' * 20}' is not a whole number of at most 9 digits",
        ("--client", "three"): "client 'three' is not a whole number",
        (): "nothing is named to forget: name clients, classes, patients or images",
        ("--client", "1", "--run", "other"): "no run other in",
        ("--client", "1", "--home", str(tmp_path)): "start one with 'fedunlearn run digits'",
        ("--status", "r9"): "there is no request r9: there are none",
        ("--client", "1", "--nodes", "0"): "--nodes 0 is too few",
        ("--client", "1", "rounds=9"): "rounds=9: a request has a strategy and settings of it",
        ("--client", "1", "strategy=relabl"): "strategy=relabl is not installed: did you mean relabel?",
        ("--client", "1", "strategy=ssd", "unlearn.lr=1"): "unlearn.lr is no setting of strategy=ssd",
        ("--client", "1", "unlearn.alpha=-"): "unlearn.alpha=-",
        ("--client", "1", "strategy=ssd,leave"): "strategy=ssd,leave: a request has one value of a setting",
        ("--client", "1", "unlearn.alpha=choice(1,2)"): "a request has one value of a setting",
        ("--client", "1", "unlearn.alpha=range(1,3)"): "a request has one value of a setting",
        ("--client", "1", "~unlearn.alpha=2"): "a request has one value of a setting",
        ("--client", "1", "strategy=null"): "strategy=null names no strategy",
        ("--client", "1", "unlearn.alpha=1", "+unlearn.alpha=2"): "unlearn.alpha is named twice",
        ("--client", "1", "strategy=ü"): "write it in quotes, as strategy='ü'",
        ("--client", "1", "strategy='ü'"): "strategy=ü is not installed",
        ("--client", "1", "unlearn.alpha=inf"): "unlearn.alpha=inf cannot be written into a receipt",
        ("--client", "1", "unlearn.alpha=1e400"): "unlearn.alpha=inf cannot be written into a receipt",
        ("--client", "1", "unlearn.alpha=nan"): "unlearn.alpha=nan",
        ("--client", "1", "ssd"): "'ssd' is no setting of the form name=value",
        ("--client", "1", "--gpus", "0.5"): "--gpus 0.5: there is no GPU here",
        ("--client", "1", "--engine", "nope"): "--engine nope is not one of ray, local",
    }
    for arguments, message in cases.items():
        assert command("forget", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert finished.folder().joinpath("ledger.sqlite").read_bytes() == before


class Own(Strategy):
    class Settings(CheckedSettings):
        whole: int = 0
        several: list[float] = Field(default_factory=list)
        text: str = ""

    def forget(self, federation, forget):
        return {}


@pytest.mark.parametrize("word", ["whole=9007199254740993", "several=[1,-inf]", "text='\udcfc'"])
def test_settings_of_ones_own_that_no_receipt_can_hold_are_refused(word):
    name = f"{__name__}:Own"
    with pytest.raises(UserError, match=rf"unlearn\.{word.partition('=')[0]}=.* cannot be written into a receipt"):
        chosen(Config(), [f"strategy='{name}'", f"unlearn.{word}"])
    assert chosen(Config(), [f"strategy='{name}'", "unlearn.whole=3"])["unlearn"]["whole"] == 3


def test_a_new_run_has_settings_that_its_receipts_can_hold(home):
    own = f"{__name__}:Own"
    with pytest.raises(UserError, match=r"unlearn\.whole=\d+ cannot be written into a receipt"):
        prepared(Config(run="new", strategy=own, unlearn={"whole": 2**60}), {})
    config = prepared(Config(run="new", strategy=own, unlearn={"several": [float("inf")]}), {})
    assert config.unlearn["several"] == [float("inf")]  # a receipt says null


@pytest.mark.parametrize("text", ["J\udcfcrgen", "a\x1b[2J", "a\nb", "a\x00", "a\u2028b"])
def test_what_is_no_text_is_refused_when_it_is_typed(finished, capsys, text):
    client = ("--client", "1")
    for words in (
        (*client, "--by", text),
        (*client, "--right", text),
        (*client, "--by", text, "--dry-run"),
        ("--accept", "r1", "--by", text),
        (*client, f"unlearn.guide=\x01{text}"),
    ):
        assert command("forget", *words, "--engine", "local") == 2
        error = capsys.readouterr().err
        assert re.search("is no text|has the control character", error)
        assert error.count("\n") == 1
    ledger = finished.run().ledger
    for ask in (
        lambda: ledger.file([1], by=text),
        lambda: ledger.file([1], right=text),
        lambda: ledger.accept("r1", text),
    ):
        with pytest.raises(UserError, match=r"is no text|has the control character"):
            ask()
    assert finished.requests() == []


def test_letters_of_any_script_are_text(finished):
    assert command("forget", "--client", "1", "--by", "Jürgen\u00a0犬", "--right", "Art. 17 DSGVO", "--dry-run") == 0


def test_an_earlier_request_gives_its_receipt_and_status_0(federate, capsys):
    federate.shared(FORGOTTEN, name="test")
    capsys.readouterr()
    assert command("forget", "--client", "3") == 0
    assert capsys.readouterr().out.startswith("r1  COMPLETED    client 3  after round 2; class accuracy client 3 ")
    assert command("forget", "--client", "3", "--json") == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert (receipt["id"], receipt["state"], receipt["clients"]) == ("r1", "COMPLETED", [3])
    assert receipt["detail"]["after"]["forgotten"]["3"]["client_id"] == 0
    assert command("forget", "--list") == command("forget", "--status", "r1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


def test_settings_that_come_too_late_are_refused_with_and_without_dry_run(federate, capsys):
    federate.shared(FORGOTTEN, name="test")
    for clients in ("3", "2,3"):
        said = []
        for dry_run in ((), ("--dry-run",)):
            capsys.readouterr()
            assert command("forget", "--client", clients, "strategy=ssd", "--engine", "local", *dry_run) == 2
            said.append(capsys.readouterr().err)
        assert said == ["error: request r1 is COMPLETED: its settings stay as they are\n"] * 2


def test_a_refused_request_gives_status_1(finished, capsys):
    assert command("forget", *(f"--client={client}" for client in range(4)), "--engine", "local") == 1
    assert "no client would be left" in capsys.readouterr().out
    assert command("forget", "--status", "r1") == 1
    assert "no client would be left" in capsys.readouterr().out


def test_a_live_run_takes_the_request_at_its_next_round_boundary(federate, capsys, caplog):
    statuses = []
    waiter = threading.Thread(target=lambda: statuses.append(command("forget", "--client", "3", "--wait")))

    def ask():
        assert command("forget", "--client", "3") == 0  # it only files
        waiter.start()
        deadline = time.monotonic() + 30
        while "request r1: RECEIVED" not in caplog.messages:  # the round does not end before
            assert time.monotonic() < deadline
            time.sleep(0.05)

    federate("rounds=2", grid=at_training(LocalGrid(2), ask))
    waiter.join(timeout=60)
    assert statuses == [0]
    (request,) = federate.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 1)
    out, err = capsys.readouterr()
    assert "run test takes the request at its next round boundary" in err
    assert "request r1: COMPLETED" in err
    assert "r1  COMPLETED    client 3  after round 1" in out


def test_a_run_that_has_closed_its_ledger_is_waited_for_and_then_applied(finished, capsys, monkeypatch):
    live = []
    monkeypatch.setattr(asking, "serve", lambda found, resources, **options: live.append(found.is_live()))
    with lock(finished.folder()):
        asker = threading.Thread(target=command, args=("forget", "--client", "3"))
        asker.start()
        while "takes no request: waiting" not in capsys.readouterr().err:
            assert asker.is_alive()
            time.sleep(0.05)
        assert live == []
    asker.join(timeout=30)
    assert live == [False]


def test_who_comes_second_to_a_run_follows_the_first(finished, capsys, monkeypatch):
    """Both commands saw no live run: one of them holds it, and applies every open request."""

    def come_second(found, resources, **options):
        first = threading.Thread(target=serve, args=(found, resources), kwargs=options)
        first.start()
        while first.is_alive() and not found.is_live():
            time.sleep(0.02)
        raise LockedError("the first holds it", finished.folder())

    serve = asking.serve
    monkeypatch.setattr(asking, "serve", come_second)
    assert command("forget", "--client", "3", "--engine", "local") == 0
    assert "request r1: COMPLETED" in capsys.readouterr().err
    assert finished.requests()[0].state == State.COMPLETED


def test_a_purge_that_cannot_begin_is_an_error_and_the_same_command_does_it(federate, capsys, monkeypatch):
    """Another purge of the state folder takes longer than this one waits."""
    federate("rounds=1 strategy=leave forget.purge=always train.client_head_steps=1")
    monkeypatch.setattr("fedunlearn.runs.sharing.LOCK_SECONDS", 0.1)
    with lock(federate.home / "data"):
        for _ in range(2):  # the request is applied by the first, and what is left is to be removed by the second
            assert command("forget", "--client", "3", "--engine", "local") == 2
            said = f"the folder {federate.home / 'data'} is locked by process {os.getpid()}: wait for it, or end it"
            assert said in capsys.readouterr().err
            assert federate.requests()[0].state == State.COMPLETED
    assert command("forget", "--client", "3", "--engine", "local") == 0
    assert [request.id for request in federate.run().ledger.purged()] == ["r1"]


def test_waiting_for_a_run_that_stops_says_how_to_go_on(finished, capsys, monkeypatch):
    monkeypatch.setattr(door.RequestHandle, "is_taken", lambda *args, **options: True)
    assert command("forget", "--client", "3", "--wait") == 2
    assert "stopped before the request was applied: repeat this command, or resume the run with run=test" in (
        capsys.readouterr().err
    )


def test_without_a_live_run_the_request_is_applied_here(finished, capsys):
    """The same weights as from a request that was applied while training."""
    finished("run=live rounds=1 forget.schedule={1:[1,3]}")
    (file,) = (finished.folder() / "checkpoints").iterdir()
    assert command("forget", "--client", "3", "--client", "1", "--run", "test", "--engine", "local") == 0
    assert "the request is applied here, on 2 virtual nodes" in capsys.readouterr().err
    (request,) = finished.requests()
    assert (request.state, request.clients) == (State.COMPLETED, [1, 3])
    assert equal(finished.state(), finished.state("live"))
    assert not file.exists()
    assert [file.name for file in (finished.folder() / "checkpoints").iterdir()] == ["round-00001-r1.safetensors"]
    assert finished.run().ledger.current().finished
    assert (finished.folder() / "report" / "index.html").exists()


def test_images_are_decoded_in_the_state_folder_that_the_run_lies_in_and_in_no_other(finished, monkeypatch, tmp_path):
    """Else images that were removed come back in the folder of the environment."""
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / "other"))
    assert command("forget", "--client", "3", "--dry-run", "--engine", "local", "--home", str(finished.home)) == 0
    assert not (tmp_path / "other").exists()


def test_a_run_without_a_name_is_applied_in_its_own_folder(federate):
    federate("rounds=1 run=''")
    (folder,) = (federate.home / "runs").iterdir()
    assert command("forget", "--client", "3", "--engine", "local") == 0
    assert list((federate.home / "runs").iterdir()) == [folder]
    (request,) = federate.requests(folder.name)
    assert request.state == State.COMPLETED


def test_a_run_in_another_state_folder_is_applied_there(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(tmp_path / "empty"))
    assert command("forget", "--client", "3", "--engine", "local", "--home", finished.home) == 0
    assert finished.requests()[0].state == State.COMPLETED
    assert not (tmp_path / "empty" / "runs").exists()


def test_a_damaged_checkpoint_is_named_before_anything_is_filed(finished, capsys):
    (file,) = (finished.folder() / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert command("forget", "--client", "3") == 2
    assert "was cut short or changed since it was written" in capsys.readouterr().err
    assert finished.requests() == []


# --- the door -----------------------------------------------------------------------------------------------------


def test_the_door_refuses_what_cannot_be_asked(finished):
    run = open_run("test")
    for clients, message in (
        ([], "nothing is named to forget"),
        ([4], "client 4 is not in 0..3"),
        ([0, -1], "client -1"),
    ):
        with pytest.raises(UserError, match=message):
            run.request(clients)
    assert run.ledger.requests() == []
    assert (run.numbers_of("12"), run.numbers_of("1,2"), run.numbers_of(3)) == ([12], [1, 2], [3])


def test_a_handle_follows_a_request_through_its_states(finished):
    run, states = open_run("test"), []
    with lock(finished.folder()):
        handle = run.request([3, 1, 3])
        following = threading.Thread(target=handle.follow, args=(lambda request: states.append(request.state),))
        following.start()
        (request,) = handle.requests()
        assert handle.is_open
        for state in (State.COLLECTING, State.APPLIED, State.COMPLETED):
            deadline = time.monotonic() + 20
            while len(states) < len(State.__members__) and states[-1:] != [request.state]:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            request = run.ledger.advance(request, state)
        following.join(timeout=20)
    assert states == ["RECEIVED", "COLLECTING", "APPLIED", "COMPLETED"]
    assert not handle.is_open
    assert handle.requests()[0].clients == [1, 3]


def test_a_handle_has_the_earlier_requests_that_cover_a_client(finished):
    run = open_run("test")
    first, both = run.request([1]), run.request([1, 2])
    assert (first.ids, both.ids) == (("r1",), ("r1", "r2"))
    assert [request.clients for request in both.requests()] == [[1], [2]]


def test_nobody_can_be_followed_where_nobody_holds_the_run(finished):
    handle = open_run("test").request([1])
    assert not handle.is_taken()
    with pytest.raises(UserError, match="run test stopped before the request was applied"):
        handle.follow()


def test_a_process_that_does_not_train_takes_no_request(finished, monkeypatch):
    """A purge holds a run whose rounds are not over: it is waited for."""
    monkeypatch.setattr(door, "CLOSING_SECONDS", 0.3)
    run = open_run("test")
    run.ledger.reopen()
    handle = run.request([1])
    with lock(finished.folder(), trains=True):
        assert handle.is_taken()
    with lock(finished.folder()), pytest.raises(TimeoutError, match="takes no more requests, but process"):
        handle.is_taken()
    assert not handle.is_taken()


def test_a_request_to_a_live_run_waits_for_the_end_of_its_round(finished):
    run = open_run("test")
    with lock(finished.folder()):
        assert run.is_live()
        (request,) = run.request([3]).requests()
    assert request.detail["not_before"] == 2
    assert not run.is_live()
    (request,) = run.request([2]).requests()
    assert request.detail["not_before"] == 2  # it does not overtake the first one


def test_a_model_comes_out_of_a_run(federate):
    federate.shared(FORGOTTEN, name="test")
    model = open_run("test").model()
    assert not model.training
    assert model.pruned.tolist() == [False, False, False, True]
    assert equal(dict(model.state_dict()), federate.state())


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_module_that_people_know_serves_a_request_in_a_flower_simulation(federate):
    """Ray and all, in a process of its own: the same weights as from a request that was applied while training."""
    federate("rounds=2 forget.schedule={2:[1,3]} run=live")
    federate("rounds=2")
    module = [sys.executable, "-m", "fedunlearn.forget"]
    words = ["--client", "3", "--client", "1", "--run", "test", "--home", str(federate.home), "--nodes", "2"]
    done = subprocess.run([*module, *words, "--gpus", "0", "--wait"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "the request is applied here, on 2 virtual nodes" in done.stderr
    assert done.stdout.startswith("r1  COMPLETED    clients 1 and 3  after round 2")
    (request,) = federate.requests()
    assert (request.state, request.clients) == (State.COMPLETED, [1, 3])
    assert equal(federate.state(), federate.state("live"))
    assert [file.name for file in (federate.folder() / "checkpoints").iterdir()] == ["round-00002-r1.safetensors"]
    assert federate.run().ledger.current().finished
    assert (federate.folder() / "report" / "index.html").exists()
    for option in (["--list"], ["--status", "r1"]):
        again = subprocess.run([*module, *option, "--json"], capture_output=True, text=True, timeout=60)
        assert [receipt["id"] for receipt in json.loads(again.stdout)] == ["r1"], again.stderr
