"""What a handle from Python does where a run is held, is starting, or does not end. Nothing here trains for long."""

import subprocess
import sys

import psutil
import pytest

import fedunlearn as fu
from fedunlearn.errors import UserError
from fedunlearn.live.background import Background
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
