"""What a handle from Python does where a run is held, is starting, or does not end. Nothing here trains for long."""

import signal
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

import fedunlearn as fu
from fedunlearn.errors import UserError
from fedunlearn.live import background
from fedunlearn.live.background import Background
from fedunlearn.live.base import RunState
from fedunlearn.live.handle import LiveRun
from fedunlearn.runs.lock import lock


@pytest.fixture
def finished(federate):
    """A handle on a run of one round that nobody holds."""
    federate.shared("rounds=1", name="test")
    return fu.open_run("test", home=str(federate.home), engine="local")


def test_who_waits_for_a_receipt_waits_no_longer_than_was_asked(finished, monkeypatch):
    """The request has ended, and the process that holds the run has not written its receipt."""
    with finished.opened() as found:
        found.ledger.file([3])
    monkeypatch.setattr(LiveRun, "_command", lambda *words, **options: [{"id": "r1"}])
    with lock(finished.folder), pytest.raises(TimeoutError, match="run test has not written the receipt of request r1"):
        finished.forget(clients=[3], timeout=0.1)


def test_a_run_that_is_starting_is_no_damaged_one(home, tmp_path):
    process = Background(
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE), tmp_path / "log", 0
    )
    try:
        with pytest.raises(UserError, match=r"^run new has not begun: it is starting$"):
            LiveRun("new", home, _process=process).request([3])
    finally:
        process.process.communicate()
    assert not home.exists()


def test_a_handle_on_a_request_keeps_no_file_open(finished):
    def opened():
        return [file for file in psutil.Process().open_files() if file.path == str(finished.folder / "ledger.sqlite")]

    before = opened()
    handle = finished.request([3])
    assert ([request.state for request in handle.requests()], handle.is_open) == (["RECEIVED"], True)
    with pytest.raises(UserError, match="run test stopped before the request was applied"):
        handle.follow()
    assert opened() == before


HOLDS = """
import signal, sys
from pathlib import Path
from fedunlearn.runs.lock import lock
signal.signal(signal.SIGTERM, getattr(signal, sys.argv[3]))
with lock(Path(sys.argv[1]), trains=sys.argv[2] == "trains"):
    print("held", flush=True)
    input()
"""


@contextmanager
def held(folder, what="trains", on_signal="SIG_DFL"):
    """Let another process hold a run."""
    words = [sys.executable, "-c", HOLDS, str(folder), what, on_signal]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_process_that_trains_the_run_is_ended(finished):
    with held(finished.folder) as process:
        assert finished.state == RunState.LIVE
        finished.stop()
        assert finished.state == RunState.FINISHED
        assert process.wait(timeout=20) == -signal.SIGTERM
    finished.stop()  # nobody holds it: nothing is to be done


def test_a_process_that_purges_a_run_or_copies_it_goes_on(finished):
    with held(finished.folder, "purges") as process:
        with pytest.raises(UserError, match=f"process {process.pid} holds run test, and does not train it"):
            finished.stop()
        assert process.poll() is None


def test_a_process_that_does_not_end_is_named(finished, monkeypatch):
    monkeypatch.setattr(background, "STOP_SECONDS", 0.3)
    with held(finished.folder, on_signal="SIG_IGN") as process:
        said = rf"run test goes on: process {process.pid} has not let go of it in 0\.3 s"
        with pytest.raises(UserError, match=said):
            finished.stop()


@pytest.mark.parametrize("said", ["", "none trains", "{other} trains", f"{2**22 + 1} trains"])
def test_a_lock_that_names_another_process_ends_none(finished, tmp_path, said):
    """The id of an earlier holder may be anybody's now."""
    with held(finished.folder) as process, held(tmp_path / "other") as other:
        (finished.folder / "lock").write_text(said.format(other=other.pid))
        with pytest.raises(UserError, match=r"cannot be ended|and does not train it"):
            finished.stop()
        assert (process.poll(), other.poll()) == (None, None)
