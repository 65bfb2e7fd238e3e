"""FedEraser beside a naive version, on four clients of handwritten digits."""

import pytest

from fedunlearn.runs import checkpoint
from fedunlearn.runs.ledger import State
from naive import SETTINGS, assert_same, average, forgotten, pruned, trained
from strategies import fed_eraser


def test_fed_eraser_replays_calibrated_updates(federate):
    settings = "unlearn.every=1 unlearn.calibration=0.5 train.server_momentum=0 train.lr=0.005"
    found, detail = forgotten(federate, "federaser", settings)
    worker = federate.worker(f"{SETTINGS} {settings}")
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    plain = dict(state)
    floating = [name for name, value in state.items() if value.is_floating_point()]
    updates = {}
    for round_ in (1, 2):  # what was stored
        ends = {c: trained(worker, c, plain, round_) for c in range(4)}
        updates[round_] = {c: {n: end[n] - plain[n] for n in floating} for c, end in ends.items()}
        plain = average(worker, ends)
    params = [name for name, _ in worker.model.named_parameters()]
    state = {name: value.clone() for name, value in pruned(worker, state).items()}
    for round_ in (1, 2):
        moved = {}
        for c in range(3):
            end = trained(worker, c, state, round_, share=0.5)
            v = {n: end[n] - state[n] for n in floating}
            u = updates[round_][c]
            length = {n: u[n].norm() / v[n].norm() if n in params and v[n].norm() else 1 for n in v}
            moved[c] = state | {n: state[n] + length[n] * v[n] for n in floating}
        state = average(worker, moved)
    assert_same(found, pruned(worker, state))
    assert detail["replayed"] == 2
    assert sorted({client for _, client in fed_eraser.updates(federate.run("federaser"))}) == [0, 1, 2]
    answers = 2 * 40 * 10 * 2  # rounds, images, classes, bytes
    bytes_of_model = sum(value.numel() * value.element_size() for value in state.values() if value.is_floating_point())
    assert detail["stored_bytes"] == pytest.approx(8 * bytes_of_model + answers, rel=0.05)


def test_what_a_crash_left_of_an_update_is_deleted_with_a_request(federate):
    federate("run=federaser strategy=federaser unlearn.every=1")
    torn = federate.folder("federaser") / fed_eraser.FOLDER / f"{checkpoint.NEW}x"
    torn.write_bytes(b"half of an update")
    federate.run("federaser").ledger.file([3])
    federate("run=federaser strategy=federaser")
    assert not torn.exists()


def test_a_round_in_which_only_leaving_clients_trained_is_not_replayed(federate):
    settings = "strategy=federaser unlearn.every=1 rounds=4 fraction=0.25 train.client_head=local"
    federate(f"{settings} run=before")
    trained = [row["clients"] for row in federate.run("before").metrics() if row["kind"] == "round"]
    once = next(clients for clients in trained if trained.count(clients) == 1)
    federate(f"{settings} forget.schedule={{4:{once}}}")
    (request,) = federate.requests()
    assert (request.state, request.detail["replayed"]) == (State.COMPLETED, 3)
