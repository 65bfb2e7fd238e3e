"""The whole server app against the whole client app, over a grid in this process."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.federation.handle import SERVER
from fedunlearn.federation.rounds import Rounds, sample
from fedunlearn.nn.client_head import train_client_head
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning import batch_norm, dampening
from fedunlearn.unlearning.fisher import diagonal_fisher
from local_grid import LocalGrid, equal, kinds
from naive import pruned

ONE_STEP = (
    "rounds=1 model.norm=group train.batch_size=1000 train.crop_padding=0 loss.client_weight=0 "
    "loss.disentangle_weight=0 loss.warmup=0 train.schedule=constant train.client_head_by=local train.server_momentum=0"
)


def test_one_round_of_one_step_is_pooled_sgd_on_the_same_examples(federate):
    federate(ONE_STEP)
    pooled = federate.pooled(ONE_STEP)
    batches = [batch for c in range(4) for batch in pooled.batches(c)]
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    settings = pooled.config.train
    optimiser = torch.optim.SGD(pooled.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    pooled.model.train()
    cross_entropy(pooled.model(images).class_logits, labels).backward()
    optimiser.step()
    assert_close(federate.state(), pooled.state(), rtol=1e-4, atol=1e-6)


TWO_ROUNDS = "rounds=2 forget.schedule={1:[3]}"


def test_the_arrival_order_and_the_window_change_no_bit(federate):
    federate.shared(TWO_ROUNDS, nodes=4, name="in_order")
    grid = LocalGrid(4)
    grid.newest_first = True
    federate(f"run=newest_first {TWO_ROUNDS} window=3", grid=grid)
    files = [next((federate.folder(run) / "checkpoints").iterdir()) for run in ("in_order", "newest_first")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("nodes", [1, 4, 6])
def test_however_many_nodes_host_the_clients_the_model_is_the_same(federate, nodes):
    federate.shared("rounds=1")
    federate("rounds=1", nodes=nodes)
    assert_close(federate.state(), federate.state("before"), rtol=1e-5, atol=1e-6)


def test_a_forgotten_client_gets_no_more_messages_and_training_goes_on(federate, capsys):
    grid = federate("rounds=3 forget.schedule={2:[3]}")
    assert ("train", 2) in kinds(grid, client=3)
    assert not [kind for kind in kinds(grid, client=3) if kind[1] > 2]
    assert kinds(grid, client=3)[-1] == ("fisher", 2)
    assert not any(json.loads(messages.task_of(message).config)["forget"]["schedule"] for message in grid.sent)
    assert [kind for kind in kinds(grid, client=1) if kind[0] == "train"] == [("train", r) for r in (1, 2, 3)]
    (request,) = federate.requests()
    assert request.state == State.COMPLETED
    assert request.detail["after"]["forgotten"]["3"]["client_id"] == 0
    assert 0 < request.detail["selected"] < 1
    last = federate.run().metrics()[-1]
    assert (last["round"], last["forgotten"]["3"]["client_id"]) == (3, 0)
    state = federate.state()
    assert state["pruned"].tolist() == [False, False, False, True]
    assert (state["client_head.out.weight"][3] == 0).all()
    assert "request r1, forgotten after round 2" in capsys.readouterr().err


def recalibrated(pooled, clients, *, fraction):
    """Set the model's BatchNorm statistics from those clients' images together, as after round 1."""
    shuffled = [images for c in clients for images in pooled.client(c, 1).shuffled_images(fraction)]
    batch_norm.recalibrate(pooled.model, batch_norm.batch_statistics(pooled.model, shuffled))


@pytest.mark.parametrize("loss_head", ["class", "client"])
def test_the_federated_step_is_the_pooled_one(federate, loss_head):
    settings = "rounds=1 train.client_head_by=local batch_norm_fraction=0.5"
    federate.shared(settings)
    before = federate.state("before")
    federate(f"{settings} unlearn.loss_head={loss_head} fork=before run=forgets forget.schedule={{1:[0, 2]}}")
    pooled = federate.pooled(settings)
    pooled.model.load_state_dict(before)
    of = {c: list(pooled.batches(c)) for c in range(4)}
    recalibrated(pooled, (1, 3), fraction=0.5)
    full = diagonal_fisher(pooled.model, [b for c in range(4) for b in of[c]], loss_head=loss_head)
    forget = diagonal_fisher(pooled.model, [*of[0], *of[2]], loss_head=loss_head)
    dampening.dampen_and_prune(pooled.model, full, forget, [0, 2], alpha=2, lambda_=0.5)
    recalibrated(pooled, (1, 3), fraction=0.5)
    assert not equal(pooled.state(), before)
    assert_close(federate.state("forgets"), pooled.state(), rtol=1e-4, atol=1e-5)


def test_held_out_images_give_batch_norm_statistics_and_no_client_is_asked(federate):
    federate("rounds=1 batch_norm_fraction=0.5")
    federation, grid = Rounds.assemble(federate.run()).federation, LocalGrid(2)
    federation.grid, before = grid, federation.state
    federation.held_out_batch_norm(20)
    pooled = federate.pooled("rounds=1")
    pooled.model.load_state_dict(before.params)
    batches = pooled.server.sample(20, generator_of(0, 1, SERVER))
    batch_norm.recalibrate(pooled.model, batch_norm.batch_statistics(pooled.model, (x for x, _, _ in batches)))
    assert equal(federation.state.params, pooled.state())
    assert not equal(federation.state.params, before.params)
    assert not grid.sent


def test_without_batch_norm_fraction_held_out_images_change_no_statistics(federate):
    federate("rounds=1 batch_norm_fraction=0")
    federation = Rounds.assemble(federate.run()).federation
    before = federation.state
    federation.held_out_batch_norm()
    assert equal(federation.state.params, before.params)


def test_a_sample_of_held_out_images_is_drawn_without_replacement_and_has_their_labels(federate):
    server = federate.pooled("rounds=1").server
    everything = server.sample(10**6, torch.Generator().manual_seed(0))
    some = [*server.sample(15, torch.Generator().manual_seed(0))]
    images = torch.cat([images for images, _, _ in some]).flatten(1)
    assert len(images) == len(images.unique(dim=0)) == 15
    labelled = {tuple(x.flatten().tolist()): int(k) for xs, ks, _ in everything for x, k in zip(xs, ks, strict=True)}
    assert len(labelled) == 40
    assert all(
        labelled[tuple(x.flatten().tolist())] == int(k) for xs, ks, _ in some for x, k in zip(xs, ks, strict=True)
    )


def test_a_request_ends_with_a_client_head_of_the_new_embeddings(federate):
    federate.shared("rounds=1")
    pooled = federate.pooled("rounds=1")
    pooled.model.load_state_dict(federate.state("before"))
    settings = "train.client_head_by=server unlearn.alpha=1000 batch_norm_fraction=0"
    federate(f"rounds=1 {settings} fork=before run=forgets forget.schedule={{1:[0]}}")
    statistics = {c: pooled.client(c, 1).embedding_statistics(pooled.model) for c in (1, 2, 3)}
    before = [p.detach().clone() for p in pooled.model.client_head.parameters()]
    steps = pooled.config.train.client_head_steps
    train_client_head(pooled.model.client_head, statistics, steps=steps, generator=generator_of(0, 1, SERVER))
    assert not any(torch.equal(a, b) for a, b in zip(before, pooled.model.client_head.parameters(), strict=True))
    assert equal(federate.state("forgets"), pruned(pooled.state(), 0))


def test_batch_norm_sees_batches_of_mixed_classes(federate):
    pooled = federate.pooled("data.limit=0 partition.dirichlet_alpha=1000")
    stored = [labels.unique().numel() for _, labels, _ in pooled.batches(0)]
    labels_of = {
        tuple(image.flatten().tolist()): int(k) for x, y, _ in pooled.batches(0) for image, k in zip(x, y, strict=True)
    }
    shuffled = [
        len({labels_of[tuple(image.flatten().tolist())] for image in images})
        for images in pooled.client(0, 1).shuffled_images()
    ]
    assert max(stored) <= 4  # a client's images are stored by class
    assert min(shuffled[:-1]) >= 5


def test_a_threshold_that_can_select_nothing_is_reported_with_the_largest_that_can(federate, capsys):
    federate.shared("rounds=1")
    federate("rounds=1 fork=before forget.schedule={1:[0]} unlearn.alpha=100")
    owned = federate.pooled().examples(0)
    assert f"of {owned} of 120 examples, take less than {120 / owned:.2f}" in capsys.readouterr().err
    assert federate.requests()[0].detail["selected"] == 0


def test_several_requests_are_applied_in_order_of_arrival(federate):
    federate("rounds=2 forget.schedule={1:[2],2:[0,3]}")
    first, second = federate.requests()
    assert (first.clients, first.detail["round"]) == ([2], 1)
    assert (second.clients, second.detail["round"]) == ([0, 3], 2)
    assert sorted(second.detail["after"]["forgotten"]) == ["0", "3"]  # a receipt says nothing about others
    assert sorted(federate.run().metrics()[-1]["after"]["forgotten"]) == ["0", "2", "3"]
    assert second.detail["after"]["retain"]["examples"] == federate.pooled().examples(1)


def test_rounds_until_completed_are_trained_before_a_request_counts_as_done(federate):
    federate("rounds=3 forget.schedule={1:[2]} forget.rounds_until_completed=1")
    (request,) = federate.requests()
    assert (request.detail["round"], request.detail["completed_round"]) == (1, 2)
    federate("run=short rounds=1 forget.schedule={1:[2]} forget.rounds_until_completed=5")
    (request,) = federate.requests("short")
    assert (request.state, request.detail["completed_round"]) == (State.COMPLETED, 1)


def test_only_the_last_checkpoint_is_kept(federate):
    federate.shared(TWO_ROUNDS, nodes=4)
    checkpoints = (federate.folder("before") / "checkpoints").iterdir()
    assert [file.name for file in checkpoints] == ["round-00002.safetensors"]


def test_a_fraction_of_the_clients_trains_and_the_draw_depends_on_the_round_alone(federate):
    federate("fraction=0.5 rounds=5 evaluate_every=5", nodes=4)
    drawn = [row["clients"] for row in federate.run().metrics()]
    assert all(len(clients) == 2 for clients in drawn)
    assert len({tuple(clients) for clients in drawn}) > 1
    config = federate.run().config
    assert [sample([0, 1, 2, 3], config, round_) for round_ in (5, 4, 3, 2, 1)] == drawn[::-1]


# --- clients and nodes that cannot do their part ------------------------------------------------------------------


def test_a_request_that_cannot_be_applied_is_refused_with_the_reason(federate):
    with pytest.raises(UserError, match="request r1 is REFUSED; all else of the run is done"):
        federate("rounds=1 forget.schedule={1:[0,1,2,3]}")
    (request,) = federate.requests()
    assert (request.state, request.detail["reason"]) == (State.REFUSED, "no client would be left")


def test_clients_without_examples_take_no_part_and_are_reported(federate, capsys):
    uneven = "rounds=1 partition.kind=class clients=11 data.limit=40 forget.schedule={1:[10]}"
    grid = LocalGrid(3)
    with pytest.raises(UserError, match="request r1 is REFUSED; all else of the run is done"):
        federate(uneven, grid=grid)
    assert "client 10 has 0 examples: it takes no part" in capsys.readouterr().err
    assert kinds(grid, client=10) == []
    (request,) = federate.requests()
    assert request.detail["reason"] == "client 10 has 0 examples and was never trained on"


def test_a_request_for_a_client_without_examples_too_is_applied_for_the_others(federate, capsys):
    grid = federate("rounds=2 partition.kind=class clients=11 data.limit=40 forget.schedule={1:[9,10]}", nodes=3)
    (request,) = federate.requests()
    assert (request.state, request.clients) == (State.COMPLETED, [9, 10])
    assert [list(request.detail[when]["forgotten"]) for when in ("before", "after")] == [["9"], ["9"]]
    assert "client 9: class" in capsys.readouterr().err
    assert kinds(grid, client=10) == []
    assert federate.run().metrics()[-1]["clients"] == list(range(9))


def test_a_client_of_one_example_does_not_break_batch_norm(federate, monkeypatch):
    split = [np.arange(60), np.arange(60, 119), np.array([119]), np.array([], int)]
    monkeypatch.setattr("fedunlearn.data.partition.partition", lambda *args, **kwargs: split)
    from fedunlearn.apps.client_app import resident

    resident.cache_clear()
    grid = federate("rounds=1 seed=5")
    resident.cache_clear()
    assert kinds(grid, client=2) == kinds(grid, client=3) == []
    assert federate.run().metrics()[0]["clients"] == [0, 1]


def test_with_messages_in_bf16_a_round_moves_the_model_almost_the_same_for_half_the_bytes(federate):
    federate.shared("rounds=1", name="wide")
    federate("rounds=1 run=narrow message_dtype=bf16")
    start, wide, narrow = federate.pooled().state(), federate.state("wide"), federate.state("narrow")
    name = "class_head.out.bias"
    assert not torch.equal(narrow[name], wide[name])
    error = (narrow[name] - wide[name]).norm() / (wide[name] - start[name]).norm()
    assert error < 0.05
    costs = [federate.run(name).metrics()[0]["train"]["bytes"] for name in ("wide", "narrow")]
    assert costs[1] < 0.53 * costs[0]


def test_a_fraction_of_the_retain_clients_examples_estimates_their_fisher(federate):
    federate.shared("rounds=1")
    settings = "rounds=1 fork=before forget.schedule={1:[3]}"
    for i, fraction in enumerate((1, 0.3)):
        grid = federate(f"{settings} run=s{i} unlearn.retain_fraction={fraction}")
        asked = [(messages.task_of(m), messages.arguments_of(m)) for m in grid.sent_for("fisher")]
        assert {client for task, _ in asked for client in task.clients} == {0, 1, 2, 3}
        fractions = [arguments.get("fraction", 1.0) for _, arguments in asked]
        assert fractions == [1.0 if 3 in task.clients else fraction for task, _ in asked]
    details = [federate.requests(f"s{i}")[0].detail for i in range(2)]
    assert details[0]["selected"] != details[1]["selected"]


def test_a_sample_is_part_of_the_clients_examples_in_order(federate):
    pooled = federate.pooled()
    whole, again = (
        torch.cat([images for images, _, _ in b]) for b in (pooled.client(1, 5).sample(1), pooled.batches(1))
    )
    assert torch.equal(whole, again)
    part, same, other = (torch.cat([i for i, _, _ in pooled.client(1, r).sample(0.5)]) for r in (5, 5, 6))
    assert len(part) == -(-len(whole) // 2)
    assert torch.equal(part, same)
    assert not torch.equal(part, other)
    places = [next(k for k, image in enumerate(whole) if torch.equal(image, chosen)) for chosen in part]
    assert places == sorted(places)


def test_a_client_trains_no_other_model_than_the_one_that_it_was_given(federate):
    pooled = federate.pooled("rounds=1")
    before = pooled.state()
    with pytest.raises(ValueError, match="trains the model that the task was given: load other weights into that"):
        pooled.client(0, 1).fit(deepcopy(pooled.model))
    assert equal(pooled.state(), before)
    assert pooled.client(0, 1).fit(pooled.model).examples == pooled.examples(0)
