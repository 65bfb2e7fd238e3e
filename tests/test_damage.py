"""State that cannot be used: one line that names the file and the way out, and no other run is harmed."""

import errno
import fcntl
import json
import re
import shutil
import sqlite3

import pytest

from command_line import command
from conftest import rewrite
from fedunlearn.runs.ledger import State
from fedunlearn.runs.run import read_about
from local_grid import equal

SMALL = ["clients=4", "rounds=3", "data.limit=120", "data.test_limit=40", "train.client_head_steps=20"]
LEAVE = [*SMALL, "strategy=leave"]
LOCAL = ["--engine", "local"]


def failed(capsys, *words):
    """The one line with which a command fails."""
    assert command(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def two(federate, capsys):
    """A run `test` of two rounds, and a copy of it called `other`."""
    federate.shared("rounds=2", name="test")
    shutil.copytree(federate.folder("test"), federate.folder("other"))
    capsys.readouterr()
    return federate


def emptied(file):
    file.write_bytes(b"")


def garbage(file):
    file.write_bytes(b"no ledger \xff" * 500)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def deleted(file):
    file.unlink()


def without_config(file):
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "config"}))


def a_list(file):
    file.write_text("[]")


@pytest.mark.parametrize("damage", [emptied, cut, without_config, a_list, garbage])
def test_a_damaged_run_json_is_named_and_stops_no_command_about_another_run(two, damage, capsys):
    file = two.folder("test") / "run.json"
    damage(file)
    before = file.read_bytes()
    for words in (["requests", "--run", "test"], ["report", "--run", "test"], ["run", "digits", "run=test", *LOCAL]):
        line = failed(capsys, *words)
        assert f"{file} is damaged" in line
        assert f"put back a copy of the file, or remove the folder {file.parent}" in line
    assert file.read_bytes() == before
    assert command("requests") == 0  # of the other run, the newest finished one
    assert command("runs", "--json") == 0
    out, err = capsys.readouterr()
    rows = {row["run"]: row["state"] for row in json.loads(out.partition("no requests\n")[2])}
    assert rows == {"test": "damaged", "other": "idle"}
    assert "run test: " in err


@pytest.mark.parametrize("damage", [emptied, garbage, cut, deleted])
def test_a_damaged_ledger_is_named_and_nothing_begins_anew(two, damage, capsys):
    folder = two.folder("test")
    file = folder / "ledger.sqlite"
    damage(file)
    checkpoints = sorted(file.name for file in (folder / "checkpoints").iterdir())
    for words in (
        ["requests", "--run", "test"],
        ["run", "digits", "run=test", *LOCAL],
        ["forget", "--run", "test", "--client", "3", *LOCAL],
    ):
        line = failed(capsys, *words)
        assert str(file) in line
        assert "put back a copy" in line
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == checkpoints
    assert command("runs", "--json") == 0
    assert {row["run"]: row["state"] for row in json.loads(capsys.readouterr().out)}["test"] == "damaged"
    assert command("requests", "--run", "other") == 0


OTHER_SHAPES = [
    b"\xff\xfe",
    b"12",
    b"null",
    b"{}",
    b"[" * 100_000,
    b'{"kind": "round", "round": null}',
    b'{"kind": "round", "round": "2", "clients": 3}',
    b'{"kind": "round", "round": 2, "clients": 3, "test": {"class": 0.5}}',
    b'{"kind": "forget", "round": 2, "request": "r1"}',
    b'{"kind": ["round"], "round": 2}',
]


@pytest.mark.parametrize("line", OTHER_SHAPES)
def test_damaged_lines_of_metrics_are_passed_over(two, line, capsys):
    file = two.folder() / "metrics.jsonl"
    rows = two.run().metrics()
    file.write_bytes(line + b"\n" + file.read_bytes() + line + b"\n")
    assert two.run().metrics() == rows
    assert f"{file}: 2 lines are damaged and passed over" in capsys.readouterr().err
    assert command("report", "--run", "test") == 0


@pytest.mark.parametrize(
    "words",
    [
        ["run", "digits", *LEAVE, *LOCAL],
        ["forget", "--client", "1"],
        ["scale", "clients=[4]"],
        ["study", "federated", "dataset=digits"],
        ["study", "paper", "dataset=digits"],
    ],
)
def test_a_home_that_cannot_be_gets_one_line(words, monkeypatch, capsys):
    monkeypatch.setenv("FEDUNLEARN_HOME", "/proc/fed")
    assert "/proc/fed" in failed(capsys, *words)


def test_a_folder_whose_files_cannot_be_locked_gets_one_line(home, monkeypatch, capsys):
    def refuse(*about):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    line = failed(capsys, "run", "digits", *LEAVE, "run=test", *LOCAL)
    assert "files cannot be locked here (No locks available): --home or FEDUNLEARN_HOME names another" in line


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on_to_the_same_bits(federate, monkeypatch, capsys):
    federate(" ".join([*LEAVE, "run=whole"]))
    from fedunlearn.runs import checkpoint

    writes, write = [], checkpoint.write_atomically

    def full(path, data):
        writes.append(path)
        if len(writes) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    line = failed(capsys, "run", "digits", *LEAVE, "run=full", "--nodes", "2", *LOCAL)
    assert "No space left on device" in line
    assert "what is committed is whole, the same command goes on from it" in line
    assert command("run", "digits", *LEAVE, "run=full", "--nodes", "2", *LOCAL) == 0
    assert equal(federate.state("full"), federate.state("whole"))


@pytest.mark.parametrize(
    ("word", "message"),
    [("clients=[4", "clients=[4"), ("clients=0", "clients=0"), ("rounds=2", "rounds=2"), ("foo=1", "foo")],
)
def test_a_scaling_study_of_bad_settings_gets_one_line(home, word, message, capsys):
    assert message in failed(capsys, "scale", word)


def test_a_copied_folder_is_a_run_of_its_own(two, capsys):
    before = two.state("test")
    assert command("run", "digits", "run=other", "rounds=3", *LOCAL) == 0
    assert equal(two.state("test"), before)
    assert two.run("test").ledger.current().round == 2
    assert command("run", "digits", "run=test", "rounds=3", *LOCAL) == 0
    assert equal(two.state("test"), two.state("other"))
    assert read_about(two.folder("other"))["config"]["rounds"] == 3


def test_a_scheduled_request_that_fails_makes_the_status_1(home, capsys):
    words = [*LEAVE, "rounds=2", "run=test", "forget.schedule={1:[0,1,2,3]}"]
    assert command("run", "digits", *words, *LOCAL) == 1
    err = capsys.readouterr().err
    assert "request r1 is REFUSED: no client would be left" in err
    assert "report: " in err


def test_a_request_that_could_not_be_applied_is_not_filed(two, monkeypatch, capsys):
    rewrite(two.folder(), data={"1": "of other images"})
    assert "run test was trained on other data" in failed(capsys, "forget", "--run", "test", "--client", "1", *LOCAL)
    assert two.requests() == []


# --- a request that is only tried, or taken back --------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_files_nothing(two, capsys):
    assert command("forget", "--run", "test", "--client", "1,3", "--dry-run") == 0
    err = capsys.readouterr().err
    examples = two.run().metrics()[-1]["retain_clients"]
    images = ", ".join(f"client {client} ({examples[client]['examples']} images)" for client in ("1", "3"))
    assert f"run test (digits, strategy=ssd, idle, after round 2 of 2) is to forget {images}\n" in err
    assert "nothing is filed (--dry-run)\n" in err
    assert two.requests() == []


def test_a_request_is_taken_back_while_it_is_received(two, capsys):
    run = two.run()
    run.ledger.file([3])
    assert command("forget", "--run", "test", "--cancel", "r1") == 0
    assert capsys.readouterr().out == "r1  CANCELLED    client 3\n"
    assert command("run", "digits", "run=test", *LOCAL) == 0
    assert two.requests()[0].state == "CANCELLED"
    assert two.run().metrics()[-1]["forgotten"] == {}
    assert command("forget", "--run", "test", "--client", "3", *LOCAL) == 0  # it may be asked for again
    assert [request.state for request in two.requests()] == ["CANCELLED", "COMPLETED"]
    assert "request r2 is COMPLETED: only a RECEIVED or a REFUSED one can be taken back" in failed(
        capsys, "forget", "--run", "test", "--cancel", "r2"
    )
    assert "there is no request r9" in failed(capsys, "forget", "--run", "test", "--cancel", "r9")


def test_a_refused_request_that_is_taken_back_leaves_no_failed_run(two, capsys):
    ledger = two.run().ledger
    ledger.advance(ledger.file([3])[0], State.REFUSED, reason="never trained on")
    assert command("run", "digits", "run=test", *LOCAL) == 1
    assert command("forget", "--run", "test", "--cancel", "r1") == 0
    assert command("run", "digits", "run=test", *LOCAL) == 0


def test_a_dry_run_says_what_the_request_would_be_refused_for(two, capsys):
    (two.home / "ids.txt").write_text("0\n99999\n")
    nobody = "no client that was asked trains on an image of patient nobody that is not forgotten"
    for words, reason in [
        (["--client", "0,1,2,3"], "no client would be left"),
        (["--examples", two.home / "ids.txt"], "of the 2 named images 1 were not found, or are forgotten already"),
        (["--patient", "nobody"], nobody),
    ]:
        assert command("forget", "--run", "test", *words, "--dry-run") == 1
        err = capsys.readouterr().err
        assert f"the request would be refused: {reason}" in err
        assert command("forget", "--run", "test", *words, *LOCAL) == 1
        assert f"is refused: {reason}" in capsys.readouterr().err
    assert [request.state for request in two.run().ledger.requests()] == [State.REFUSED] * 3
    assert command("forget", "--run", "test", "--client", "1", "--class", "3", "--dry-run") == 0
    foreseen = re.search(r"(\d+) training images? would be forgotten: \1 of client 1$", capsys.readouterr().err, re.M)
    assert command("forget", "--run", "test", "--client", "1", "--class", "3", *LOCAL) == 0
    (number,) = two.requests()[-1].clients
    assert two.run().ledger.examples()[number] == int(foreseen[1])


def test_a_dry_run_of_what_was_asked_for_before_shows_the_earlier_request(two, capsys):
    two.run().ledger.file([3])
    assert command("forget", "--run", "test", "--client", "3", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert out == "r1  RECEIVED     client 3\n"
    assert err == "run test: nothing is filed (--dry-run)\n"


def test_a_failed_request_counts_until_another_one_makes_up_for_it(two, capsys):
    ledger = two.run().ledger
    ledger.advance(ledger.file([3])[0], State.QUARANTINED, reason="no reply")
    assert [request.id for request in ledger.unmet()] == ["r1"]
    assert command("run", "digits", "run=test", *LOCAL) == 1
    assert command("requests", "--run", "test") == 0  # to look is no failure
    assert command("forget", "--run", "test", "--client", "3", *LOCAL) == 0
    assert ledger.unmet() == []
    assert command("run", "digits", "run=test", *LOCAL) == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.loss=nowhere:loss", "train.loss=nowhere:loss: No module named 'nowhere'"),
        ("train.loss=json:decoder", "train.loss=json:decoder is no function"),
        ("model=json:nothing", "model.name=json:nothing: module 'json' has no attribute 'nothing'"),
        ("model=torchvision:nowhere", "model.name=torchvision:nowhere"),
        ("strategy=nowhere:Mine", "strategy nowhere:Mine: No module named 'nowhere'"),
        ("rounds=1", "run test has rounds=2, not 1: use another run name"),
    ],
)
def test_a_mistake_is_said_before_ray_is_started(two, word, message, monkeypatch, capsys):
    monkeypatch.setattr("fedunlearn.apps.simulate.simulate", lambda *about, **more: pytest.fail("started"))
    name = "run=test" if word.startswith("rounds") else "run=new"
    assert message in failed(capsys, "run", "digits", name, word)
    assert not two.folder("new").exists()


def test_a_study_with_a_wrong_loss_is_refused(home, capsys):
    words = ["dataset=digits", "scale=laptop", "train.loss=nowhere:loss"]
    assert "train.loss=nowhere:loss: No module named 'nowhere'" in failed(capsys, "study", "federated", *words)


def test_of_several_live_runs_one_must_be_named(two, capsys):
    from fedunlearn.runs.lock import lock

    with lock(two.folder("test")), lock(two.folder("other")):
        line = failed(capsys, "forget", "--client", "3")
        assert "2 runs are live: name one with --run (" in line
    assert two.requests("test") == two.requests("other") == []


def test_a_locked_ledger_is_waited_for_aloud_and_given_up(two, monkeypatch, capsys):
    monkeypatch.setattr("fedunlearn.runs.database.TRY_SECONDS", 0.1)
    monkeypatch.setattr("fedunlearn.runs.database.LOCKED_SECONDS", 0.5)
    file = two.folder() / "ledger.sqlite"
    other = sqlite3.connect(file)
    other.execute("BEGIN EXCLUSIVE")
    assert command("requests", "--run", "test") == 2
    waiting, error = capsys.readouterr().err.splitlines()
    assert waiting == f"waiting for another process to unlock {file}, for 0.5 s at most"
    assert error == (
        f"error: {file} cannot be used (database is locked): another process has had it for 0.5 s: wait for that, or "
        "end it"
    )
    other.close()
    assert command("requests", "--run", "test") == 0
