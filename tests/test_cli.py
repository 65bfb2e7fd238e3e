"""The command line: help, settings, runs and requests, a run from its start to its report."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from command_line import command
from fedunlearn import __version__, cli
from fedunlearn.apps.simulate import app_folder
from fedunlearn.config import Config
from fedunlearn.errors import UserError
from fedunlearn.federation.strategy import strategy_class, strategy_names
from fedunlearn.federation.tasks import tasks_of
from fedunlearn.runs.lock import lock
from fedunlearn.schema import fields_of

SMALL = ["clients=4", "rounds=2", "data.limit=120", "data.test_limit=40", "train.client_head_steps=20"]
LOCAL = ["--engine", "local", "--nodes", "2"]


def paths(group=cli.cli, above=()):
    """Every command, as the words that name it."""
    click = typer.main.get_command(group) if isinstance(group, typer.Typer) else group
    found = [above]
    for name, below in getattr(click, "commands", {}).items():
        found += paths(below, (*above, name))
    return found


@pytest.fixture
def finished(federate, capsys):
    """A finished run of three rounds, which has forgotten client 3 after the second."""
    federate.shared("forget.schedule={2:[3]}", name="test")
    capsys.readouterr()
    return federate


# --- help and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", paths(), ids=" ".join)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_says_what_it_does(path, option, capsys):
    assert command(*path, option) == 0
    out = capsys.readouterr().out
    assert f"Usage: {' '.join(['fedunlearn', *path])} " in re.sub(r"\x1b\[[\d;]*m", "", out)


def test_all_commands_of_the_design_are_there():
    known = {" ".join(path) for path in paths()}
    assert known == {"", "run", "forget", "runs", "requests", "report", "demo", "scale", "config", "serve"} | {
        "study",
        "study paper",
        "study federated",
        "verify",
        "purge",
        "scan",
        "keys",
        "keys new",
        "keys id",
        "leave",
        "deploy",
        "deploy check",
        "keys ask",
        "keys sign",
    }


def test_version(capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_an_unknown_command_or_option_has_status_2(capsys):
    for words in (["nope"], ["run"], ["runs", "--nope"], ["forget", "--nodes", "two"]):
        assert command(*words) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_config_lists_every_setting_with_default_range_and_meaning(capsys):
    assert command("config") == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["setting", "default", "range", "what", "it", "means"]
    assert [line.split()[0] for line in lines] == [name for name, _ in fields_of(Config)]
    (lr,) = (line for line in lines if line.startswith("train.lr "))
    assert re.fullmatch(r"train\.lr +0\.05 +0\.\.100 +SGD learning rate at the start", lr)
    (norm,) = (line for line in lines if line.startswith("model.norm "))
    assert re.fullmatch(
        r'model\.norm +"batch" +one of batch, group, none +BatchNorm, GroupNorm or nothing, of ours', norm
    )


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("train", [name for name, _ in fields_of(Config) if name.startswith("train.")]),
        ("train.lr", ["train.lr"]),
        ("rounds", ["rounds"]),
        ("unlearn", ["unlearn"]),
        ("ssd", ["unlearn.tune", "unlearn.alpha", "unlearn.lambda_"]),
        ("subset", ["unlearn.guide", "unlearn.guide_images", "unlearn.temperature"]),
    ],
)
def test_config_of_a_group_a_setting_or_a_strategy(name, names, capsys):
    assert command("config", name) == 0
    table = capsys.readouterr().out.partition("\n\n")[0]
    found = [line.split()[0] for line in table.splitlines()[1:]]
    assert found[: len(names)] == names
    assert name not in ("train", "train.lr", "rounds", "unlearn") or len(found) == len(names)


@pytest.mark.parametrize("name", strategy_names())
def test_config_of_a_strategy_says_what_a_client_shares(name, capsys):
    assert command("config", name) == 0
    settings, shares = capsys.readouterr().out.split("\n\n")
    assert "unlearn." in settings or settings == f"{name} has no settings"
    heading, *tasks = shares.splitlines()
    assert heading == "What a client shares when it is asked for:"
    assert [line.split()[0] for line in tasks] == list(tasks_of(strategy_class(name)))
    assert all(len(line.split()) > 3 for line in tasks)


def test_config_of_something_unknown_suggests_the_nearest(capsys):
    assert command("config", "sdd") == 2
    assert capsys.readouterr().err == "error: strategy=sdd is not installed: did you mean ssd?\n"


# --- a look at runs -----------------------------------------------------------------------------------------------


def test_without_runs(home, capsys):
    assert command("runs") == 0
    assert capsys.readouterr().out == "no runs\n"
    for words in (["requests"], ["report"], ["forget", "--list"]):
        assert command(*words) == 2
        error = capsys.readouterr().err
        assert "start one with 'fedunlearn run digits'" in error
        assert error.count("\n") == 1


def test_runs_are_listed(finished, capsys):
    assert command("runs") == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "state", "round", "rounds", "data", "strategy", "requests", "MB", "created"]
    assert float(line.split()[8]) > 0
    assert line.split()[:7] == ["test", "idle", "3", "3", "digits", "ssd", "r1"]
    with lock(finished.folder()):
        assert command("runs", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"], row["round"], row["requests"]) == ("test", "live", 3, "r1 COMPLETED")
    assert command("runs", "--home", finished.home / "other") == 0
    assert capsys.readouterr().out == "no runs\n"


def test_files_that_vanish_beside_a_live_run_end_no_list_of_runs(finished, capsys, monkeypatch):
    """A live run deletes files at any time: after they were listed, and after they were looked at first."""
    gone = finished.folder() / "checkpoints" / ".new-model"
    gone.write_bytes(bytes(1000))
    (finished.folder() / "checkpoints" / ".new-other").symlink_to("nowhere")
    stat = Path.stat

    def vanishes(path, **options):
        found = stat(path, **options)
        if path.name == gone.name:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", vanishes)
    assert command("runs") == 0
    assert not gone.exists()
    assert "test  idle" in capsys.readouterr().out


def test_requests_are_listed_and_shown(finished, capsys):
    assert command("requests") == command("requests", "r1", "--run", "test") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]
    assert lines[0].startswith("r1  COMPLETED    client 3  after round 2; class accuracy client 3 ")
    assert command("requests", "--json") == 0
    (receipt,) = json.loads(capsys.readouterr().out)
    assert (receipt["id"], receipt["detail"]["strategy"]) == ("r1", "ssd")
    assert command("requests", "r2") == 2
    assert capsys.readouterr().err == "error: there is no request r2: there are r1\n"


def test_a_run_without_requests_says_so(federate, capsys):
    federate.shared("rounds=1", name="test")
    capsys.readouterr()
    assert command("requests") == 0
    assert capsys.readouterr().out == "no requests\n"


def test_a_report_is_written_anew(finished, capsys):
    page = finished.folder() / "report" / "index.html"
    page.unlink()
    assert command("report", "--run", "test") == 0
    out = capsys.readouterr().out
    assert out.endswith(f"report: {page}\n")
    assert "after round 3" in out
    assert "Who has what" in page.read_text()


# --- a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def flower():
    """What Flower's logger lets through, by the end of the test."""
    logger, records = logging.getLogger("flwr"), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    kept = logger.level, list(logger.filters)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.level, logger.filters = kept


def test_a_run_in_this_process_from_its_start_to_its_report(home, pictures, capsys, flower):
    words = [*SMALL, "strategy=ssd", "unlearn.tune=fixed", "forget.schedule={1:[3]}", "run=1.10"]
    assert command("run", "digits", *words, *LOCAL) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fedunlearn {__version__}: digits clients=4 rounds=2")
    for text in (
        "run 1.10: starting in this process",
        "run 1.10 starts",
        "4 clients on 2 virtual nodes; one each: --nodes 4",
        "request r1, forgotten after round 1",
        f"report: {home / 'runs' / '1.10' / 'report' / 'index.html'}",
    ):
        assert text in err
    assert re.search(r"^round +2/2 .* 0 s left$", err, re.MULTILINE)
    assert (home / "runs" / "1.10" / "report" / "index.html").exists()
    assert flower == []

    assert command("run", "digits", "run=1.10", "rounds=3", *LOCAL, "--verbose") == 0
    err = capsys.readouterr().err
    assert "run 1.10 goes on after round 2 of 3" in err
    assert re.search(r"^round +3/3 ", err, re.MULTILINE)
    assert any("ROUND 1/1" in line for line in flower)

    assert command("run", "digits", "run=1.10", "rounds=2", *LOCAL) == 2
    assert "error: run 1.10 has rounds=3, not 2: use another run name" in capsys.readouterr().err


def test_settings_of_the_runs_own_strategy_may_be_named_again(finished, capsys):
    assert command("run", "digits", "run=test", "unlearn.alpha=2", *LOCAL) == 0
    assert command("run", "digits", "run=test", "unlearn.alpha=3", *LOCAL) == 2
    assert "run test has unlearn.alpha=2.0, not 3: use another run name" in capsys.readouterr().err


def test_a_fork_from_the_command_line(finished, capsys):
    words = ["run=other", "fork=test", "strategy=leave", "rounds=4"]
    assert command("run", "digits", *words, *LOCAL) == 0
    assert "run other goes on after round 3 of 4" in capsys.readouterr().err
    assert command("runs", "--json") == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["test"]["round"], rows["test"]["strategy"]) == (3, "ssd")
    assert (rows["other"]["round"], rows["other"]["strategy"], rows["other"]["requests"]) == (
        4,
        "leave",
        "r1 COMPLETED",
    )


def test_there_are_no_more_nodes_than_clients(federate, capsys):
    assert command("run", "digits", *SMALL, "rounds=1", "clients=3", "strategy=leave", "--engine", "local") == 0
    assert "3 clients on 3 virtual nodes\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--engine", "nope"], "--engine nope is not one of ray, local"),
        (["digits", "--nodes", "0"], "--nodes 0 is too few: a simulation has at least 1"),
        (["digits", "--cpus", "0"], "--cpus 0 is too few: a node needs at least 1"),
        (["digits", "--gpus", "0.5"], "--gpus 0.5: there is no GPU here, leave it out"),
        (["digits", "round=3"], "round is no setting: did you mean rounds?"),
        (["digits", "rounds=0"], "rounds=0 is not in 1..1000000"),
        (["digits", "strategy=ssd", "unlearn.alpa=2"], "unlearn.alpa is no setting of strategy=ssd: did you mean"),
        (["digits", "strategy=sdd"], "strategy=sdd is not installed: did you mean ssd?"),
        (["digits", "data.name=folder", "data.root=/nowhere"], "data.root=/nowhere does not exist"),
        (["digits", "run=../x"], "run='../x' is no name"),
        (["digits", "fork=nothing"], "no run nothing in"),
        (["nope"], "there is no app nope: give a folder, or one of cifar10, cifar100, digits, scaling"),
        (["/nowhere"], "there is no app /nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_status_2_before_anything_starts(home, words, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = [] if "--engine" in words else ["--engine", "local"]
    assert command("run", *words, *engine) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("fedunlearn ", "run "))]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (home / "runs").exists()


def test_an_app_is_a_name_or_a_folder(tmp_path):
    digits = app_folder("digits")
    assert (digits / "conf" / "config.yaml").exists()
    assert app_folder(str(digits)) == digits
    with pytest.raises(UserError, match=r"there is no app .*: give a folder, or one of cifar10"):
        app_folder(str(tmp_path))


def test_an_error_of_the_code_is_shown_with_its_traceback(federate, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("strategies.leave.LeaveAndContinue.forget", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["run", "digits", *SMALL, "rounds=1", "strategy=leave", "forget.schedule={1:[3]}", *LOCAL])


def test_as_a_module_in_a_process_of_its_own(home):
    done = subprocess.run(
        [sys.executable, "-m", "fedunlearn", "run", "nope"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: there is no app nope")
