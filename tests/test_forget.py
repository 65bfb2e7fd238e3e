"""The forget command: in this process where a run is live or nothing is to be served, through Ray where it serves."""

import json
import subprocess
import sys
import threading
import time

from flwr.app import Context, RecordDict

from fedunlearn import forget
from fedunlearn.runs.ledger import Ledger, State
from fedunlearn.runs.run import hold
from local_grid import LocalGrid


def test_bad_input_gets_one_line_and_status_2(federate, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert forget.main(["--client", "3"]) == 2
    assert "start one with 'flwr run simulations/digits'" in capsys.readouterr().err
    federate("rounds=1")
    before = federate.folder().joinpath("ledger.sqlite").read_bytes()
    cases = {
        ("--client", "4"): "client 4 is not in 0..3",
        ("--client", "-1"): "client -1 is not in 0..3",
        ("--client", "three"): "client 'three' is not a whole number in 0..3",
        (): "no client to forget: name one in 0..3",
        ("--client", "1", "--run", "other"): "no run other in",
        ("--status", "r9"): "run test has no request r9: there are none",
        ("--client", "1", "--nodes", "0"): "--nodes 0 is too few",
        ("--client", "1", "--gpus", "0.5"): "--gpus 0.5: there is no GPU here",
    }
    for arguments, message in cases.items():
        assert forget.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert federate.folder().joinpath("ledger.sqlite").read_bytes() == before


def test_an_earlier_request_gives_its_receipt_and_status_0(federate, capsys):
    federate("forget.schedule={1:[3]}")
    capsys.readouterr()
    assert forget.main(["--client", "3"]) == 0
    assert capsys.readouterr().out.startswith("r1  COMPLETED    clients 3  after round 1; class accuracy client 3 ")
    assert forget.main(["--client", "3", "--json"]) == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert (receipt["id"], receipt["state"], receipt["clients"]) == ("r1", "COMPLETED", [3])
    assert receipt["detail"]["after"]["forgotten"]["3"]["client_id"] == 0
    assert forget.main(["--list"]) == forget.main(["--status", "r1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]


def test_a_refused_request_gives_status_1(federate, capsys):
    federate("forget.schedule={1:[0,1,2,3]}")
    assert forget.main(["--status", "r1"]) == 1
    assert "no client would be left" in capsys.readouterr().out


def test_a_live_run_takes_the_request_at_its_next_round_boundary(federate, capsys):
    grid, statuses = LocalGrid(2), []
    waiter = threading.Thread(target=lambda: statuses.append(forget.main(["--client", "3", "--wait"])))

    def deliver(message):
        if message.metadata.message_type == "train" and not waiter.ident:
            assert forget.main(["--client", "3"]) == 0  # it only files
            waiter.start()
        return grid.call(message)

    grid.deliver = deliver
    federate("rounds=4", grid=grid)
    waiter.join(timeout=60)
    assert statuses == [0]
    (request,) = federate.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 1)
    out = capsys.readouterr().out
    assert "run test takes the request at its next round boundary" in out
    assert "r1  COMPLETED    clients 3  after round 1" in out


def test_a_run_that_has_closed_its_ledger_is_waited_for_and_then_served(federate, capsys, monkeypatch):
    federate("rounds=1")
    served = []
    monkeypatch.setattr(forget, "serve", lambda folder, options: served.append(forget.is_live(folder)))
    with hold(federate.folder()):
        command = threading.Thread(target=forget.main, args=(["--client", "3"],))
        command.start()
        while "is closing: waiting" not in capsys.readouterr().out:
            assert command.is_alive()
            time.sleep(0.05)
        assert served == []
    command.join(timeout=30)
    assert served == [False]


def test_waiting_for_a_run_that_stops_says_how_to_go_on(federate, capsys, monkeypatch):
    federate("rounds=1")
    monkeypatch.setattr(forget, "taken_by_live_run", lambda *args: True)
    assert forget.main(["--client", "3", "--wait"]) == 2
    assert 'resume it with overrides="run=test"' in capsys.readouterr().err


def test_the_live_run_comes_first_then_the_newest_finished_one(federate):
    for name in ("one", "two", "three"):
        federate(f"rounds=1 run={name}")
    ledger = Ledger(federate.folder("three") / "ledger.sqlite")
    ledger.commit(0, "round-00000.safetensors", "00")  # as if it had been stopped before its first round
    ledger.close()
    assert forget.find_run(federate.home, None).name == "two"
    with hold(federate.folder("one")):
        assert forget.find_run(federate.home, None).name == "one"
    assert forget.find_run(federate.home, "three").name == "three"
    stored = federate.folder("two") / "run.json"
    stored.write_text(stored.read_text().replace('"recover_lr"', '"of_an_older_version"'))
    assert forget.find_run(federate.home, None).name == "one"


def test_a_run_without_a_name_is_served_in_its_own_folder(federate, capsys, monkeypatch):
    federate("rounds=1 run=''")
    (folder,) = (federate.home / "runs").iterdir()

    def serve_here(server_app, client_app, **options):
        server_app(LocalGrid(options["num_supernodes"]), Context(1, 1, {}, RecordDict(), {}))

    monkeypatch.setattr("flwr.simulation.run_simulation", serve_here)
    assert forget.main(["--client", "3"]) == 0
    assert list((federate.home / "runs").iterdir()) == [folder]
    (request,) = federate.requests(folder.name)
    assert request.state == State.COMPLETED


def test_a_damaged_checkpoint_is_named_before_anything_is_filed(federate, capsys):
    federate("rounds=1")
    (file,) = (federate.folder() / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert forget.main(["--client", "3"]) == 2
    assert "was cut short or changed since it was written" in capsys.readouterr().err
    assert federate.requests() == []


def test_without_a_live_run_the_request_is_served_in_a_flower_simulation(federate):
    """Ray and all, in a process of its own: the same weights as from a request that was served while training."""
    federate("rounds=2 forget.schedule={2:[1,3]} run=live")
    federate("rounds=2")
    command = [sys.executable, "-m", "fedunlearn.forget", "--client", "3", "--client", "1", "--run", "test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "no live run: run test is served here" in done.stdout
    (request,) = federate.requests()
    assert (request.state, request.clients) == (State.COMPLETED, [1, 3])
    live, served = federate.state("live"), federate.state()
    assert all((live[name] == value).all() for name, value in served.items())
    assert [file.name for file in (federate.folder() / "checkpoints").iterdir()] == ["round-00002-r1.safetensors"]
    assert federate.run().ledger.head().finished
    assert (federate.folder() / "report" / "index.html").exists()
