"""What the server keeps beside the model: which weights are held, how much they still move, and past answers."""

import pytest
import torch

from fedunlearn.federation.server_state import ServerModel
from fedunlearn.runs import checkpoint

SETTINGS = "rounds=2 train.client_head=local train.server_momentum=0.5 unlearn.recalibrate=false"
LEAVES = "forget.schedule={2:[3]}"


pytestmark = pytest.mark.usefixtures("known")


@pytest.fixture
def server(federate):
    """Makes the server's model of a run of one round."""

    def make(settings):
        federate(f"{settings} rounds=1 run=other")
        return ServerModel(federate.run("other"), federate.worker(settings))

    return make


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("train.schedule=constant", {1: 0.0, 5: 0.0, 9: 0.0}),
        ("train.schedule=steps", {1: 1.0, 4: 1.0, 5: (0.09 / 0.99) ** 2, 7: 0.0, 8: 0.0, 30: 0.0}),
        ("train.schedule=cosine train.lr_end=0.1", {1: 1.0, 8: 0.0, 30: 0.0}),
    ],
)
def test_held_weights_move_while_the_learning_rate_has_to_fall(server, schedule, wanted):
    held = server(f"{SETTINGS} {schedule}")
    held.config.rounds = held.worker.config.rounds = 8
    assert {round_: pytest.approx(held.freedom(round_)) for round_ in wanted} == wanted


def test_held_weights_move_by_their_freedom(server, monkeypatch):
    held = server(f"{SETTINGS} train.server_momentum=0")
    monkeypatch.setattr(ServerModel, "freedom", lambda self, round_: 0.25)
    before = {name: value.clone() for name, value in held.model.named_parameters()}
    name = next(iter(before))
    held.held[name] = torch.rand_like(before[name]) < 0.5
    held.advance({name: torch.ones_like(value) for name, value in before.items()}, 1)
    for other, value in held.model.named_parameters():
        wanted = torch.where(held.held.get(other, torch.tensor(False)), 0.25, 1.0)
        torch.testing.assert_close(value - before[other], wanted.expand_as(value))


def test_what_a_first_request_holds_a_second_does_not_let_go(server):
    held = server(SETTINGS)
    masks = []
    for _ in range(2):
        before = {name: value.detach().clone() for name, value in held.model.named_parameters()}
        with torch.no_grad():
            for value in held.model.parameters():
                value += torch.randn_like(value)
        held.hold(before, 0.3)
        masks.append(torch.cat([mask.flatten() for mask in held.held.values()]))
    assert masks[0].float().mean() == pytest.approx(0.3, abs=1e-3)
    assert masks[1][masks[0]].all()
    assert masks[1].float().mean() == pytest.approx(0.3 + 0.7 * 0.3, abs=0.02)


def test_the_weights_that_unlearning_moved_most_are_held_also_after_a_restart(federate):
    settings = f"{SETTINGS} strategy=subset unlearn.rounds=1 unlearn.hold=0.5 {LEAVES}"
    settings += " train.schedule=constant loss.warmup=0"
    federate(f"{settings} rounds=2 run=before")
    served = federate.state("before")
    federate(f"{settings} rounds=3 run=goes_on")
    head = federate.run("goes_on").ledger.head()
    state, _ = checkpoint.read_tensors(federate.folder("goes_on") / "checkpoints" / head.checkpoint)
    held = {name.removeprefix("held."): value for name, value in state.items() if name.startswith("held.")}
    count = sum(value.numel() for value in held.values())
    share = sum(int(value.sum()) for value in held.values()) / count
    assert 0.49 < share <= 0.5  # of those that tie with the last one, none
    moved = False
    for name, mask in held.items():
        assert torch.equal(state[name][mask], served[name][mask]), name
        moved |= bool((state[name] != served[name]).any())
    assert moved


def test_what_was_answered_on_unseen_images_is_kept_by_round_until_a_request(federate):
    settings = f"{SETTINGS} strategy=leave forget.schedule={{3:[1]}}"
    federate(f"{settings} rounds=3 evaluate_every=2 run=before")
    worker, kept = federate.worker(SETTINGS), federate.beside("before")
    assert not [name for name in kept if not name.startswith("held.")]
    federate(f"{SETTINGS} strategy=leave rounds=3 evaluate_every=2")
    kept = federate.beside()
    assert {name for name in kept if name.startswith("answers.")} == {"answers.2", "answers.3"}
    worker.model.load_state_dict(federate.state())
    said = worker.predict_test().class_probs
    assert torch.equal(kept["answers.3"], said.half())
    assert not torch.equal(kept["answers.2"], said.half())
    federate(f"{settings} rounds=5 evaluate_every=2 run=before_and_after")
    kept = federate.beside("before_and_after")
    assert {name for name in kept if name.startswith("answers.")} == {"answers.4", "answers.5"}
