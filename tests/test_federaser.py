"""FedEraser beside a naive version, on four clients of handwritten digits."""

import shutil

import pytest

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.runs.files import NEW
from fedunlearn.runs.ledger import State
from local_grid import LocalGrid, equal
from naive import FORGETS, SETTINGS, assert_same, average, pruned, settings_of, trained
from strategies import federaser

EVERY = "strategy=federaser unlearn.every=1"


def test_federaser_replays_calibrated_updates(federate):
    training = f"{SETTINGS} train.server_momentum=0 train.lr=0.005"
    settings = settings_of("federaser", f"unlearn.every=1 unlearn.calibration_fraction=0.5 {training}")
    federate(f"{settings} {FORGETS}")
    (request,) = federate.requests()
    pooled = federate.pooled(training)
    state = pooled.state()
    plain = dict(state)
    floating = [name for name, value in state.items() if value.is_floating_point()]
    updates = {}
    for round_ in (1, 2):  # what was stored
        ends = {c: trained(pooled, c, plain, round_) for c in range(4)}
        updates[round_] = {c: {n: end[n] - plain[n] for n in floating} for c, end in ends.items()}
        plain = average(pooled, ends)
    params = [name for name, _ in pooled.model.named_parameters()]
    state = pruned(state)
    for round_ in (1, 2):
        moved = {}
        for c in range(3):
            end = trained(pooled, c, state, round_, fraction=0.5)
            v = {n: end[n] - state[n] for n in floating}
            u = updates[round_][c]
            length = {n: u[n].norm() / v[n].norm() if n in params and v[n].norm() else 1 for n in v}
            moved[c] = state | {n: state[n] + length[n] * v[n] for n in floating}
        state = average(pooled, moved)
    assert_same(federate.state(), pruned(state))
    assert (request.state, request.detail["replayed"]) == (State.COMPLETED, 2)
    assert sorted({client for _, client in federaser.updates(federaser.place(federate.folder(), 1))}) == [0, 1, 2]
    predictions = 2 * 40 * 10 * 2  # rounds, images, classes, bytes
    bytes_of_model = sum(value.numel() * value.element_size() for value in state.values() if value.is_floating_point())
    assert request.detail["stored_bytes"] == pytest.approx(8 * bytes_of_model + predictions, rel=0.05)


def test_what_a_crash_left_of_an_update_is_deleted_with_a_request(federate):
    federate(f"rounds=1 {EVERY}")
    torn = federaser.place(federate.folder(), 0) / f"{NEW}x"
    torn.write_bytes(b"half of an update")
    federate.run().ledger.file([3])
    federate(f"rounds=1 {EVERY}")
    assert federate.requests()[0].state == State.COMPLETED
    assert not torn.exists()


def test_stored_updates_change_with_the_commit_and_not_before(federate, monkeypatch):
    """A request that dies before its commit, or is set aside, leaves them as they were; then they are the new ones."""
    federate(f"rounds=2 {EVERY} run=once forget.schedule={{2:[3]}}")
    federate(f"rounds=2 {EVERY}")
    before = contents(federaser.place(federate.folder(), 0))

    def dies(*about, **words):
        raise KeyboardInterrupt

    federate.run().ledger.file([3])
    with monkeypatch.context() as patch:
        patch.setattr("fedunlearn.runs.ledger.Ledger.commit", dies)
        with pytest.raises(KeyboardInterrupt):
            federate(f"rounds=2 {EVERY}")
    assert contents(federaser.place(federate.folder(), 0)) == before
    federate(f"rounds=2 {EVERY}")
    assert equal(federate.state(), federate.state("once"))
    assert not federaser.place(federate.folder(), 0).exists()
    first, second = (contents(federaser.place(federate.folder(name), 1)) for name in ("test", "once"))
    assert first == second


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_round_in_which_only_forget_clients_trained_is_not_replayed(federate):
    settings = f"{EVERY} rounds=4 fraction=0.25 evaluate_every=4 train.client_head_by=local"
    federate(f"{settings} run=before")
    drawn = [row["clients"] for row in federate.run("before").metrics() if row["kind"] == "round"]
    once = next(clients for clients in drawn if drawn.count(clients) == 1)
    federate(f"{settings} fork=before forget.schedule={{4:{once}}}")
    (request,) = federate.requests()
    assert (request.state, request.detail["replayed"]) == (State.COMPLETED, 3)


def test_without_stored_updates_a_request_is_set_aside_with_the_reason(federate):
    federate.shared("rounds=1")
    with pytest.raises(UserError, match="request r1 is QUARANTINED; all else of the run is done"):
        federate(f"rounds=1 {EVERY} fork=before forget.schedule={{1:[3]}} forget.attempts=1")
    (request,) = federate.requests()
    reason = "updates of some rounds are not stored: "
    reason += "strategy=federaser has to be chosen from the start, and for every request"
    assert (request.state, request.detail["reason"]) == (State.QUARANTINED, reason)


def test_rounds_of_another_strategy_before_a_fork_are_missing(federate):
    federate.shared("rounds=1")
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        federate(f"rounds=2 {EVERY} fork=before forget.schedule={{2:[3]}} forget.attempts=1")
    assert "updates of some rounds are not stored" in federate.requests()[0].detail["reason"]


def test_after_a_request_of_another_strategy_the_rounds_before_it_are_missing(federate, capsys):
    federate(f"rounds=1 {EVERY}")
    assert command("forget", "--run", "test", "--client", "3", "strategy=leave", "--engine", "local") == 0
    federate(f"rounds=2 {EVERY}")
    federate.run().ledger.file([2])
    with pytest.raises(UserError, match="request r2 is QUARANTINED"):
        federate(f"rounds=2 {EVERY}")
    assert "updates of some rounds are not stored" in federate.requests()[1].detail["reason"]


def test_updates_of_a_round_that_was_cut_short_are_not_replayed(federate):
    """Client 2 answered before the crash, and is silent when the round is repeated."""
    federate(f"rounds=1 {EVERY} run=other")
    federate(f"rounds=1 {EVERY}")
    there, here = (federaser.place(federate.folder(name), 0) for name in ("other", "test"))
    shutil.copy(federaser.stored(there, 1, 2), federaser.stored(here, 2, 2))
    grid = LocalGrid(4)
    grid.deliver = lambda message: None if is_training(message, 2) else grid.call(message)
    federate(f"rounds=2 {EVERY} timeout=0.5", grid=grid, nodes=4)
    assert federaser.updates(here) == [*((1, client) for client in range(4)), *((2, client) for client in (0, 1, 3))]


def is_training(message, client):
    task = messages.task_of(message)
    return task.name == "train" and client in task.clients


def test_before_the_first_stored_round_a_request_waits_for_it(federate, capsys):
    federate("rounds=2 strategy=federaser unlearn.every=2 forget.schedule={1:[3]}")
    reason = (
        "no update of a retain client is stored yet: the first are those of round 2 (unlearn.every), and the run is"
    )
    assert f"attempt 1: {reason} after round 1; tried again at the next boundary" in capsys.readouterr().err
    (request,) = federate.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 2)


def test_a_request_of_its_own_strategy_comes_too_late_for_stored_updates(federate, capsys):
    federate.shared("rounds=1", name="test")
    assert command("forget", "--run", "test", "--client", "3", "strategy=federaser", "--engine", "local") == 1
    assert "strategy=federaser has to be chosen from the start" in capsys.readouterr().err
