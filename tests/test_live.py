"""The notebook, and runs from Python: handles, tables, receipts, audits. All share one run."""

import ast
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import fedunlearn as fu
from fedunlearn.apps.simulate import app_folder
from fedunlearn.composing import compose
from fedunlearn.config import Config
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.live import auditing, background, frames
from fedunlearn.live.base import RunState
from fedunlearn.live.receipt import Receipt
from fedunlearn.live.words import options_for, words_of
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.ledger import Request, State
from fedunlearn.runs.lock import lock

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
SMALL = (
    'rounds=2, clients=4, data={"limit": 160, "test_limit": 40}, forget={"gate": False}, strategy="leave", run="story"'
)
NEVER_STARTED = {"model": {"width": 8}, "data": {"limit": 160, "test_limit": 40}, "engine": "local"}


def executed(cell, names):
    """What a notebook would show below a cell: the value of its last line, if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None


def seen(value):
    """What a notebook would show of a value: its card, its picture or its text."""
    if hasattr(value, "_repr_png_"):
        return repr(value._repr_png_()[:4])
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def tell(home):
    """Execute the notebook, of a smaller run, while an event loop runs as in Jupyter; gives what its cells show."""
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    text = ["".join(cell["source"]) for cell in cells]
    assert sum(bool(line.strip()) for cell in text for line in cell.splitlines()) <= 12
    assert "rounds=14" in text[0]
    first, *others = (cell.replace("rounds=14", SMALL).replace("clients=[7]", "clients=[3]") for cell in text)
    names = {}

    async def told():
        shown = [seen(executed(first, names))]
        with pytest.raises(UserError) as too_early:
            names["run"].audit()
        return [*shown, *(seen(executed(cell, names)) for cell in others), str(too_early.value)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDUNLEARN_HOME", str(home))
        return asyncio.run(told())


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What the notebook has left; the first worker that needs it executes it, and the others share it."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "story"
    with lock(home, patience=600):
        if not (home / "shown.json").exists():
            (home / "shown.json").write_text(json.dumps(tell(home)))
    run = fu.open_run("story", home=str(home), engine="local")
    (receipt,) = run.receipts()
    shown = json.loads((home / "shown.json").read_text())
    return SimpleNamespace(home=home, shown=shown, run=run, receipt=receipt, audit=run.audit(retrained=1))


pytestmark = pytest.mark.slow  # together, so that one worker has them

# --- the story ----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_the_notebook_trains_forgets_plots_and_audits(story):
    waited, metrics, receipt, is_valid, figure, audit, last, _ = story.shown
    assert "finished" in waited
    assert "round</span> &nbsp;2 of 2" in waited
    assert "<th>test_accuracy</th>" in metrics
    assert f"Receipt {story.receipt.request} of run story, client 3" in receipt
    assert "COMPLETED" in receipt
    assert is_valid == "True"
    assert figure == repr(b"\x89PNG")
    assert story.audit.verdict in audit
    assert last == repr((False, story.audit.verdict))
    assert (story.receipt.state, story.receipt.clients, story.receipt.asked_by) == ("COMPLETED", [3], "client 7")


def test_a_row_a_round_has_what_was_written(story):
    metrics, rows = story.run.metrics(), story.run.rows()
    written = [row for row in rows if row["kind"] == "round"]
    assert list(metrics["train_loss"]) == [row["loss"] for row in written]
    assert list(metrics["test_accuracy"]) == [row["test"]["class"] for row in written]
    assert list(metrics["client_id_accuracy"]) == [row["retain"]["client_id"] for row in written]
    assert list(metrics["client_2"]) == [row["retain_clients"]["2"]["class"] for row in written]
    assert metrics["forget_accuracy"].isna().all()  # nobody was forgotten in these rounds
    assert isinstance(metrics.index, pd.Index)
    assert metrics.index.name == "round"


def test_a_row_a_request_has_what_was_measured_around_it(story):
    requests = story.run.requests()
    (row,) = (row for row in story.run.rows() if row["kind"] == "forget")
    one = requests.loc["r1"]
    assert (one["clients"], one["state"], one["strategy"], one["round"]) == ("3", "COMPLETED", "leave", 2)
    before, after = (row[when]["forgotten"]["3"] for when in ("before", "after"))
    assert one["forget_accuracy_before"] == before["class"]
    assert one["memorisation_gap_after"] == pytest.approx(after["class"] - after["held_out"])
    assert one["test_accuracy_after"] == row["after"]["test"]["class"]


def test_the_model_is_the_current_one(story):
    run = story.run
    with run.opened() as found:
        expected = found.model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in run.model().state_dict().items())
    assert run.predict(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 10)
    assert run.class_names() == [str(k) for k in range(10)]


def test_a_handle_on_a_run_that_exists_is_the_same(story, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(story.home))
    again = fu.open_run()  # the retrained model is newer
    assert (again.name, again.state, again.round) == ("story", RunState.FINISHED, 2)
    assert again.wait(quiet=True) is again
    assert again.metrics().equals(story.run.metrics())
    assert [receipt.content for receipt in again.receipts()] == [story.receipt.content]
    assert "<h1>" in again.report().html
    assert "srcdoc" in again.report()._repr_html_()


def test_a_receipt_says_what_is_signed_and_a_changed_one_is_refused(story, tmp_path):
    receipt = story.receipt
    assert receipt.as_dict()["clients"] == [3]
    assert receipt.page.html.startswith("<!")
    with pytest.raises(AttributeError, match="a receipt has no 'sate': request, clients"):
        receipt.sate  # noqa: B018
    assert receipt.verify(log=story.run.folder / "ledger.sqlite", key=receipt.head.key)
    with pytest.raises(UserError, match="it is not signed with the key"):
        receipt.verify(key="0" * 64)
    copy = Path(shutil.copy(receipt.path, tmp_path / "r1.json"))
    changed = Receipt(copy)
    copy.write_bytes(copy.read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(UserError):
        changed.verify()


@pytest.mark.parametrize(
    ("whom", "message"),
    [
        ({"clients": [9]}, r"client 9 is not in 0\.\.3"),
        ({"classes": ["12"]}, "class .?12.? is not one of 0, 1, 2"),
    ],
)
def test_a_request_that_cannot_be_is_refused_in_the_commands_words(story, whom, message):
    with pytest.raises(UserError, match=message):
        story.run.forget(**whom, quiet=True)
    assert list(story.run.requests().index) == ["r1"]


def test_a_look_imports_no_torch(story):
    code = (
        "import sys, fedunlearn as fu; run = fu.open_run('story', home=sys.argv[1]); run.metrics(); run.requests(); "
        "run._repr_html_(); print(sorted({'torch', 'flwr', 'ray', 'matplotlib'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(story.home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


# --- audits -------------------------------------------------------------------------------------------------------


def test_an_audit_compares_with_a_run_that_never_had_the_client(story):
    run, audit = story.run, story.audit
    retrained = fu.open_run(*audit.retrained, home=str(story.home))
    assert retrained.config.seed == run.config.seed + 1
    assert retrained.config.forget.schedule == {0: [3]}
    assert list(audit.table.index) == ["this run", "retrained, seed 1"]
    assert audit.table["forget_accuracy"]["this run"] == run.requests().loc["r1", "forget_accuracy_after"]
    assert audit.table["test_accuracy"]["retrained, seed 1"] == retrained.metrics().loc[2, "test_accuracy"]
    assert audit.table["mia_accuracy"].between(0, 1).all()
    (verdict,) = audit.verdicts
    assert audit.verdict == verdict.title
    assert "a model that was retrained without client 3 gets" in audit.text


def test_an_audit_is_about_some_images_of_a_client_too(federate, home):
    federate("rounds=2 strategy=leave")
    ours = federate.run()
    chosen = Selection.by(classes=[int(Auditor(ours.config).class_counts([1])[0].argmax())])
    ours.request([1], selection=chosen)
    ours.ledger.close()
    federate("rounds=3 strategy=leave")
    audit = fu.open_run("test", home=str(home), engine="local").audit(retrained=1)
    (name,) = audit.retrained
    retrained = federate.run(name)
    (request,) = retrained.ledger.requests()
    assert (request.owners, request.selection, request.state) == ([1], chosen, State.COMPLETED)
    examples = [row["examples"] for row in retrained.metrics() if row["kind"] == "round"]
    assert examples == [row["examples"] for row in federate.run().metrics() if row["kind"] == "round"][-1:] * 3
    assert audit.table["mia_accuracy"].between(0, 1).all()
    assert "of client 1 gets" in audit.text


def test_the_same_audit_trains_nothing_again(story, monkeypatch):
    def started(*about, **options):
        pytest.fail("it trains again")

    monkeypatch.setattr(background.Background, "started", started)
    again = story.run.audit(retrained=1)
    assert again.verdicts == story.audit.verdicts
    pd.testing.assert_frame_equal(again.table, story.audit.table)
    with pytest.raises(pytest.fail.Exception, match="it trains again"):
        story.run.audit(retrained=2)


def test_what_an_audit_will_cost_is_said_by_the_runs_own_rounds(story, capsys, monkeypatch):
    seconds = story.run.metrics()["seconds"].median()
    with story.run.opened() as found:
        said = auditing.announcement(found, [3], 50)
    expected = auditing.duration(50 * 2 * seconds)
    assert said.startswith(
        f"50 retrained models to train without client 3, 2 rounds each, about {expected} of training"
    )


def test_an_audit_needs_a_finished_run_that_forgot_somebody(story):
    assert story.shown[-1] == "run story has forgotten nobody: there is nothing to audit"
    with pytest.raises(UserError, match="retrained=0 is too few"):
        story.run.audit(retrained=0)
    with lock(story.run.folder), pytest.raises(UserError, match=r"run story is live: wait\(\) for it"):
        story.run.audit()


@pytest.mark.parametrize(
    ("app", "words"),
    [
        ("digits", ["strategy=ssd", "unlearn.alpha=2", "forget.signed=true", "run=mine"]),
        ("digits", ["model=small_cnn", "model.options={dropout:0.5,width:8}", "model.head_size=small"]),
        ("cifar10", ["scale=laptop", "rounds=5", "train.schedule_rounds=3", "fork=other"]),
        (
            "cifar10",
            ["scale=full", "data.name=folder", "data.root=/tmp/a b=1, $x {c}", "forget.purge=always", "readmit=[1,2]"],
        ),
    ],
)
def test_a_retrained_model_has_all_settings_of_the_run_but_those_of_forgetting(app, words):
    config = compose(app_folder(app) / "conf", words)
    plan = auditing.plan_of(type("Found", (), {"config": config}), [3, 5], 2)
    composed = compose(
        app_folder("digits" if config.scale == "auto" else "cifar10") / "conf", words_of(auditing.settings_of(plan))
    )
    assert composed == plan
    ours, theirs = config.model_dump(), plan.model_dump()
    differ = {name for name in ours if ours[name] != theirs[name]}
    assert differ <= {"run", "fork", "home", "seed", "strategy", "unlearn", "forget"}
    assert (plan.seed, plan.forget.schedule, plan.forget.purge) == (2, {0: [3, 5]}, "never")


def test_predictions_of_the_auditor_are_those_that_are_counted(story):
    run = story.run
    auditor, params = Auditor(run.config), run.model().state_dict()
    of_two = auditor.predictions(params, [1, 3], most=10**6)
    counted = auditor.evaluate(params, 1) + auditor.evaluate(params, 3)
    assert (of_two.total.examples, of_two.total.class_correct) == (counted.examples, counted.class_correct)
    assert len(auditor.predictions(params, [1, 3], most=7).class_labels) == 7


def test_clients_with_names_are_called_by_them():
    score = {"class": 0.5, "client_id": 0.1, "examples": 4, "held_out": 0.25}
    row = {"kind": "round", "round": 1, "forgotten": {"1": score, "2": score}, "test": {"class": 0.5, "examples": 9}}
    table = frames.of_rounds([row], ["hospital_a", "hospital_b"])
    assert [*table.columns[-2:]] == ["client_hospital_b", "client_2"]  # the last is a portion of one
    assert (table.loc[1, "forget_accuracy"], table.loc[1, "memorisation_gap"]) == (0.5, 0.25)
    request = Request("r1", [1], State.RECEIVED, "2026-01-01", {})
    assert frames.of_requests([request], ["hospital_a", "hospital_b"]).loc["r1", "clients"] == "hospital_b"


# --- settings -----------------------------------------------------------------------------------------------------


def test_one_client_is_a_client_and_not_its_digits():
    assert options_for({"client": "12", "class": 10}) == ["--client=12", "--class=10"]
    assert options_for({"client": np.int64(3), "patient": [""], "class": None}) == ["--client=3", "--patient="]


def test_settings_become_words():
    settings = {
        "rounds": np.int64(8), "model": {"width": 8, "client_head": False}, "train.lr": 1e-3, "run": "a b",
        "forget": {"schedule": {6: [3, 1]}, "keys": {0: "a'b"}}, "unlearn": {"tune": "1.10", "alpha": 2}, "readmit": [],
    }  # fmt: skip
    assert words_of(settings) == [
        "rounds=8", "model.width=8", "model.client_head=false", "train.lr=0.001", "run=a b",
        "forget.schedule={6:[3,1]}", r"forget.keys={0:'a\'b'}", "unlearn.tune='1.10'", "unlearn.alpha=2", "readmit=[]",
    ]  # fmt: skip


def test_none_is_no_setting_and_not_the_name_of_a_run():
    assert words_of({"run": None, "model": {"width": None}, "unlearn": {"guide": None}}) == ["unlearn.guide=null"]


def test_every_setting_can_be_given_and_means_the_same():
    given = Config(rounds=8).model_dump(exclude={"home", "scale"})
    composed = compose(app_folder("digits") / "conf", words_of(given))
    assert composed == Config(rounds=8)


@pytest.mark.parametrize(
    ("app", "settings", "message"),
    [
        ("digits", {"round": 8}, "round is no setting: did you mean rounds?"),
        ("digits", {"engin": "local"}, "engin is no setting: did you mean engine?"),
        ("digits", {"model": {"widht": 8}}, r"model\.widht is no setting: did you mean model\.width?"),
        (
            "digits",
            {"strategy": "ssd", "unlearn": {"alpa": 1}},
            r"unlearn\.alpa is no setting of strategy=ssd: did you mean",
        ),
        ("digits", {"rounds": 0}, r"rounds=0 is not in 1\.\."),
        ("digits", {"engine": "rya"}, "--engine rya is not one of ray, local"),
        ("digit", {}, "there is no app digit: give a folder, or one of cifar10"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(home, app, settings, message):
    with pytest.raises(UserError, match=message):
        fu.run(app, **settings)
    assert not (home / "logs").exists()


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_run_outlives_impatience_and_says_who_killed_it(home, capsys):
    run = fu.run("digits", **NEVER_STARTED)
    assert run.state == RunState.STARTING
    assert run.metrics().empty
    assert run.requests().empty
    with pytest.raises(TimeoutError, match=rf"run {run.name} is not done within 0\.1 s, and goes on"):
        run.wait(timeout=0.1)
    with pytest.raises(TimeoutError, match="has not trained its first round yet"):
        run.forget(clients=[3], timeout=0.1)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run.wait()
    assert "goes on in the background: wait() waits again, stop() ends it" in capsys.readouterr().err
    assert run.state in (RunState.STARTING, RunState.LIVE)
    os.kill(run._process.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=rf"run {run.name} failed after round 0: SIGKILL ended it"):
        run.wait()
    assert "SIGKILL ended it" in run._repr_html_()
    with pytest.raises(UserError, match="failed after round 0: SIGKILL"):
        run.forget(clients=[3])


def test_a_run_that_is_stopped_says_so_and_two_never_have_one_name(home):
    one, other = (fu.run("digits", **NEVER_STARTED) for _ in range(2))
    assert one.name != other.name
    for run in (one, other):
        run.stop()
        assert run.state == RunState.STOPPED
        with pytest.raises(UserError, match=rf"run {run.name} stopped after round 0"):
            run.wait()


def test_a_run_that_fails_has_its_own_words(home, tmp_path):
    run = fu.run("digits", data={"name": "folder", "root": str(tmp_path / "nowhere")}, engine="local")
    with pytest.raises(UserError, match=rf"run {run.name} failed after round 0: .*nowhere.*log: .*{run.name}\.log"):
        run.wait(timeout=120, quiet=True)
    assert run.state == RunState.FAILED
    assert not (runs_folder(home) / run.name / "run.json").exists()


def test_lines_of_rounds_are_written_over_in_a_notebook(tmp_path, capsys, monkeypatch):
    log = tmp_path / "log"
    log.write_text("earlier\nrun a starts\nround   1/2  loss 2\nround   2/2  loss 1\nrepo")
    background.Lines(log, len("earlier\n")).show()
    assert capsys.readouterr().err == "run a starts\nround   1/2  loss 2\nround   2/2  loss 1\n"
    monkeypatch.setitem(background.sys.modules, "ipykernel", background)
    lines = background.Lines(log, len("earlier\n"))
    lines.show()
    shown = capsys.readouterr()
    assert [part.rstrip() for part in shown.out.split("\r")] == [
        "run a starts",
        "round   1/2  loss 2",
        "round   2/2  loss 1",
    ]
    log.write_text(log.read_text() + "rt: here\n")
    lines.show()
    assert capsys.readouterr().out == "\nreport: here\n"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("a\nerror: no such file\nstarted\n", "no such file"),
        (
            "error: early\nstopped by SIGTERM: the same command goes on\n",
            "stopped by SIGTERM: the same command goes on",
        ),
        (
            "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: none left\n",
            "torch.OutOfMemoryError: none left",
        ),
        ("report: here\nrequest r1 is QUARANTINED: why\n", "request r1 is QUARANTINED: why"),
        ("round 1\n", ""),
    ],
)
def test_the_last_words_of_a_process_are_its_reason(tmp_path, said, words):
    (tmp_path / "log").write_text("error: of an earlier process\n" + said)
    assert background.last_words(tmp_path / "log", len("error: of an earlier process\n")) == words


def test_names_of_images_reach_the_command_as_a_file(tmp_path):
    from fedunlearn.commands import read_names
    from fedunlearn.live.handle import _as_file

    with _as_file(["a/3.png", "Zürich = 1"]) as file:
        assert read_names(Path(file)) == ["a/3.png", "Zürich = 1"]
    assert not Path(file).exists()
    for given, kept in ((tmp_path / "ids.txt", tmp_path / "ids.txt"), ("ids.txt", "ids.txt"), ((), "")):
        with _as_file(given) as file:
            assert file == kept
