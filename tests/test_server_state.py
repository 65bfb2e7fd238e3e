"""What the server keeps between rounds: the model, momentum, which weights are frozen, and past predictions."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from fedunlearn.composing import compose
from fedunlearn.federation import server_state
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.server_state import ServerState
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.run import Run
from local_grid import equal
from naive import ONCE, SETTINGS, settings_of


def test_updates_add_up_and_names_that_they_lack_stay():
    state = ServerState(1, {"w": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)})
    after = server_state.apply_update(state, {"w": torch.tensor([0.5, -1.0])})
    assert (after.params["w"].tolist(), after.params["count"].item(), after.round) == ([1.5, 1.0], 3, 1)
    assert state.params["w"].tolist() == [1, 2]


def test_a_state_is_never_changed():
    state = ServerState(1, {"w": torch.zeros(1)})
    with pytest.raises(FrozenInstanceError):
        state.round = 2


def test_by_hand_momentum_is_of_parameters_alone():
    state = ServerState(0, {"w": torch.zeros(1), "running_mean": torch.zeros(1)})
    for expected in (1.0, 1 + 1.5, 2.5 + 1.75):
        update = {"w": torch.ones(1), "running_mean": torch.ones(1)}
        state = server_state.apply_round(state, update, parameters=["w"], beta=0.5, frozen_lr_scale=1)
        assert state.params["w"].item() == expected
    assert state.params["running_mean"].item() == 3
    assert state.momentum.keys() == {"w"}
    plain = server_state.apply_round(state, {"w": torch.ones(1)}, parameters=["w"], beta=0, frozen_lr_scale=1)
    assert plain.params["w"].item() == 5.25


def test_frozen_weights_move_by_their_scale():
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(50, generator=generator) for name in ("a", "b")}
    state = ServerState(0, params, frozen={"a": torch.rand(50, generator=generator) < 0.5})
    update = {name: torch.ones(50) for name in params}
    after = server_state.apply_round(state, update, parameters=list(params), beta=0, frozen_lr_scale=0.25)
    expected = torch.where(state.frozen["a"], 0.25, 1.0)
    torch.testing.assert_close(after.params["a"] - params["a"], expected)
    torch.testing.assert_close(after.params["b"] - params["b"], torch.ones(50))


def test_by_hand_the_weights_that_changed_most_by_their_layers_measure_are_frozen():
    before = {"small": torch.zeros(4), "large": torch.zeros(4)}
    after = {"small": torch.tensor([1.0, 2.0, 3.0, 9.0]) / 1000, "large": torch.tensor([1.0, -9.0, 2.0, 3.0])}
    state = server_state.freeze(ServerState(1, after), before, 0.25, ["small", "large"])
    assert state.frozen["small"].tolist() == [False, False, False, True]
    assert state.frozen["large"].tolist() == [False, True, False, False]


def test_nothing_is_kept_where_nothing_freezes():
    state = ServerState(1, {"w": torch.ones(4)})
    assert server_state.freeze(state, {"w": torch.zeros(4)}, 0.0, ["w"]) is state


@pytest.mark.parametrize(("fraction", "frozen"), [(0.5, 0), (1, 4)])
def test_weights_that_tie_with_the_last_one_stay_free(fraction, frozen):
    state = ServerState(1, {"w": torch.ones(4)})
    state = server_state.freeze(state, {"w": torch.zeros(4)}, fraction, ["w"])
    assert int(state.frozen["w"].sum()) == frozen


def test_what_a_first_request_froze_a_second_does_not_let_go():
    generator, masks = torch.Generator().manual_seed(0), []
    state = ServerState(1, {"a": torch.zeros(30, 40), "b": torch.zeros(2000)})
    for _ in range(2):
        before = state.params
        update = {name: torch.randn(value.shape, generator=generator) for name, value in before.items()}
        state = server_state.freeze(server_state.apply_update(state, update), before, 0.3, list(before))
        masks.append(torch.cat([mask.flatten() for mask in state.frozen.values()]))
    assert masks[0].float().mean() == pytest.approx(0.3, abs=1e-3)
    assert masks[1][masks[0]].all()
    assert masks[1].float().mean() == pytest.approx(0.3 + 0.7 * 0.3, abs=0.02)


def full_state():
    params = {
        "w": torch.ones(2),
        "pruned": torch.tensor([False, True, False]),
        "client_head.out.weight": torch.ones(3, 2),
        "client_head.out.bias": torch.ones(3),
        "pruned_classes": torch.tensor([True, False]),
        "class_head.out.weight": torch.ones(2, 2),
        "class_head.out.bias": torch.ones(2),
    }
    state = ServerState(3, params, {"w": torch.ones(2)}, {"w": torch.tensor([True, False])})
    return server_state.remember(state, torch.full((4, 2), 0.5))


def test_a_checkpoint_says_everything():
    state = full_state()
    tensors = state.tensors()
    assert {name for name in tensors if name not in state.params} == {"momentum.w", "frozen.w", "predictions.3"}
    again = ServerState.from_tensors(3, tensors)
    assert again.round == 3
    for kind in ("params", "momentum", "frozen", "predictions"):
        assert equal(getattr(again, kind), getattr(state, kind)), kind
    assert state.stored_bytes == 4 * 2 * 2  # images, classes, bytes


def test_after_a_request_neurons_are_pruned_and_only_what_is_frozen_is_kept_beside():
    state = full_state()
    after = server_state.after_request(state, [2], [1])
    assert after.params["pruned"].tolist() == [False, True, True]
    assert after.params["client_head.out.bias"].tolist() == [1, 1, 0]
    assert after.params["pruned_classes"].tolist() == [True, True]
    assert after.params["class_head.out.bias"].tolist() == [1, 0]
    assert (after.momentum, after.predictions) == ({}, {})
    assert equal(after.frozen, state.frozen)


def test_beginning_anew_keeps_nothing_but_who_was_pruned():
    unmarked = {"pruned": torch.tensor([False] * 3), "pruned_classes": torch.tensor([False] * 2)}
    initial = full_state().params | {"w": torch.zeros(2)} | unmarked
    after = server_state.begin_anew(full_state(), initial, [2])
    assert after.params["w"].tolist() == [0, 0]
    assert after.params["pruned"].tolist() == [False, True, True]
    assert after.params["pruned_classes"].tolist() == [True, False]
    assert (after.round, after.momentum, after.frozen, after.predictions) == (3, {}, {}, {})
    after.params["w"] += 1
    assert initial["w"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("train.schedule=constant", {1: 0.0, 5: 0.0, 9: 0.0}),
        ("train.schedule=steps", {1: 1.0, 4: 1.0, 5: (0.09 / 0.99) ** 2, 7: 0.0, 8: 0.0, 30: 0.0}),
        ("train.schedule=cosine train.lr_end=0.1", {1: 1.0, 8: 0.0, 30: 0.0}),
    ],
)
def test_frozen_weights_move_while_the_learning_rate_has_to_fall(home, digits, tmp_path, schedule, expected):
    config = compose(digits, f"rounds=8 data.limit=40 data.test_limit=20 {schedule}")
    federation = Rounds.assemble(Run(tmp_path, config, Ledger(tmp_path / "ledger.sqlite"))).federation
    found = {round_: federation.frozen_lr_scale(round_) for round_ in expected}
    assert found == pytest.approx(expected)


@pytest.mark.usefixtures("memorised")
def test_the_weights_that_unlearning_changed_most_are_frozen_also_after_a_restart(federate):
    settings = settings_of("subset", f"unlearn.rounds=1 unlearn.epochs=1 {ONCE} unlearn.freeze_fraction=0.5")
    settings += " train.schedule=constant loss.warmup=0 forget.schedule={2:[3]}"
    federate(f"{settings} rounds=2")
    applied = federate.server_state()
    federate(f"{settings} rounds=3")
    state = federate.server_state()
    assert equal(state.frozen, applied.frozen)
    count = sum(mask.numel() for mask in state.frozen.values())
    fraction = sum(int(mask.sum()) for mask in state.frozen.values()) / count
    assert 0.49 < fraction <= 0.5  # of those that tie with the last one, none
    assert not [name for name in state.frozen if name.startswith("client_head.")]
    for name, mask in state.frozen.items():
        assert torch.equal(state.params[name][mask], applied.params[name][mask]), name
    assert any(not torch.equal(state.params[name], applied.params[name]) for name in state.frozen)


def test_predictions_on_held_out_images_are_kept_by_round_until_a_request(federate):
    settings = f"{SETTINGS} strategy=leave evaluate_every=2"
    federate(f"{settings} rounds=3")
    kept = federate.server_state()
    assert kept.predictions.keys() == {"2", "3"}
    pooled = federate.pooled(SETTINGS)
    pooled.model.load_state_dict(kept.params)
    found = pooled.predictions().class_probs
    assert torch.equal(kept.predictions["3"], found.half())
    assert not torch.equal(kept.predictions["2"], found.half())
    federate(f"{settings} rounds=3 fork=test run=forgets forget.schedule={{3:[1]}}")
    after = federate.server_state("forgets")
    assert (after.predictions, after.momentum) == ({}, {})
    federate("run=forgets strategy=leave rounds=5")
    assert federate.server_state("forgets").predictions.keys() == {"4", "5"}
