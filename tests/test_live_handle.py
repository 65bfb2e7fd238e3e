"""What a handle from Python does where a run is held, is starting, or does not end. Nothing here trains for long."""

import pytest

import fedunlearn as fu
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
