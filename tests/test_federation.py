"""The whole server app against the whole client app, over a grid in this process."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fedunlearn.federation import messages as wire
from fedunlearn.federation.server_state import HEAD
from fedunlearn.nn.client_head import train_client_head
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning import batch_norm, dampening
from fedunlearn.unlearning.fisher import diagonal_fisher
from fedunlearn.unlearning.pruning import prune_clients
from local_grid import LocalGrid, equal, kinds

ONE_STEP = (
    "rounds=1 model.norm=group train.batch_size=1000 train.crop_padding=0 loss.client_weight=0 "
    "loss.disentangle_weight=0 loss.warmup=0 train.schedule=constant train.client_head=local train.server_momentum=0"
)


def test_one_round_of_one_step_is_pooled_sgd_on_the_same_examples(federate):
    federate(ONE_STEP)
    worker = federate.worker(ONE_STEP)
    batches = [batch for c in range(4) for batch in worker.batches(c)]
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    settings = worker.config.train
    optimiser = torch.optim.SGD(worker.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    worker.model.train()
    cross_entropy(worker.model(images).class_logits, labels).backward()
    optimiser.step()
    assert_close(federate.state(), dict(worker.model.state_dict()), rtol=1e-4, atol=1e-6)


def test_the_arrival_order_and_the_window_change_no_bit(federate):
    federate("run=in_order forget.schedule={2:[3]}", nodes=4)
    first = federate.home / "runs"
    grid = LocalGrid(4)
    grid.newest_first = True
    federate("run=newest_first forget.schedule={2:[3]} window=3", grid=grid)
    files = [next((first / name / "checkpoints").iterdir()).read_bytes() for name in ("in_order", "newest_first")]
    assert files[0] == files[1]


def test_two_nodes_and_four_give_the_same_model(federate):
    federate("rounds=1", nodes=4)
    four = federate.state()
    federate("rounds=1 run=two", nodes=2)
    two = torch.cat([v.flatten().float() for v in federate.state("two").values()])
    assert_close(two, torch.cat([v.flatten().float() for v in four.values()]), rtol=1e-5, atol=1e-6)


def test_a_forgotten_client_gets_no_more_messages_and_training_goes_on(federate, capsys):
    grid = federate("rounds=4 forget.schedule={2:[3]}")
    assert ("train", 2) in kinds(grid, client=3)
    assert not [kind for kind in kinds(grid, client=3) if kind[1] > 2]
    assert kinds(grid, client=3)[-1] == ("query.fisher", 2)
    assert not any(json.loads(wire.task_of(message).config)["forget"]["schedule"] for message in grid.sent)
    assert [kind for kind in kinds(grid, client=1) if kind[0] == "train"] == [("train", r) for r in (1, 2, 3, 4)]
    (request,) = federate.requests()
    assert request.state == State.COMPLETED
    assert request.detail["after"]["forgotten"]["3"]["client_id"] == 0
    assert 0 < request.detail["selected"] < 1
    last = federate.run().metrics()[-1]
    assert (last["round"], last["forgotten"]["3"]["client_id"]) == (4, 0)
    assert federate.state()["pruned"].tolist() == [False, False, False, True]
    assert (federate.state()["client_head.out.weight"][3] == 0).all()
    assert "request r1, forgotten after round 2" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["class", "client"])
def test_the_federated_step_is_the_pooled_one(federate, head):
    settings = f"rounds=1 unlearn.head={head} train.client_head=local"
    federate(settings)
    before = federate.state()
    federate(f"{settings} run=forgets forget.schedule={{1:[0, 2]}}")
    worker = federate.worker(settings)
    worker.model.load_state_dict(before)
    of = {c: list(worker.batches(c)) for c in range(4)}
    full = diagonal_fisher(worker.model, [b for c in range(4) for b in of[c]], head=head)
    forget = diagonal_fisher(worker.model, [*of[0], *of[2]], head=head)
    dampening.step(worker.model, full, forget, [0, 2], alpha=2, lambda_=0.5)
    moments = batch_norm.batch_moments(worker.model, [b for c in (1, 3) for b in worker.shuffled_images(c, 1)])
    batch_norm.recalibrate(worker.model, moments)
    assert not equal(dict(worker.model.state_dict()), before)
    assert_close(federate.state("forgets"), dict(worker.model.state_dict()), rtol=1e-4, atol=1e-5)


def test_a_request_ends_with_a_client_head_of_the_new_embeddings(federate):
    settings = "rounds=1 train.client_head=server strategy=ssd unlearn.alpha=1000 unlearn.recalibrate=false"
    federate(settings)
    worker = federate.worker(settings)
    worker.model.load_state_dict(federate.state())
    federate(f"{settings} run=forgets forget.schedule={{1:[0]}}")
    moments = {c: worker.embedding_moments(c, 1) for c in (1, 2, 3)}
    before = [p.detach().clone() for p in worker.model.client_head.parameters()]
    steps = worker.config.train.head_steps
    train_client_head(worker.model.client_head, moments, steps=steps, generator=generator_of(0, 1, HEAD))
    assert not any(torch.equal(a, b) for a, b in zip(before, worker.model.client_head.parameters(), strict=True))
    prune_clients(worker.model, [0])
    assert equal(federate.state("forgets"), dict(worker.model.state_dict()))


def test_batch_norm_sees_batches_of_mixed_classes(federate):
    worker = federate.worker("data.limit=0 partition.dirichlet_alpha=1000")
    stored = [labels.unique().numel() for _, labels, _ in worker.batches(0)]
    labels_of = {
        tuple(image.flatten().tolist()): int(k) for x, y, _ in worker.batches(0) for image, k in zip(x, y, strict=True)
    }
    shuffled = [
        len({labels_of[tuple(image.flatten().tolist())] for image in images}) for images in worker.shuffled_images(0, 1)
    ]
    assert max(stored) <= 4  # a client's images are stored by class
    assert min(shuffled[:-1]) >= 5


def test_a_threshold_that_can_select_nothing_is_reported_with_the_largest_that_can(federate, capsys):
    federate("rounds=1 forget.schedule={1:[0]} unlearn.alpha=100")
    owned = federate.worker().examples(0)
    assert f"of {owned} of 120 examples, take less than {120 / owned:.2f}" in capsys.readouterr().out
    assert federate.requests()[0].detail["selected"] == 0


def test_several_requests_are_served_in_order_of_arrival(federate):
    federate("forget.schedule={1:[2],2:[0,3]}")
    first, second = federate.requests()
    assert (first.clients, first.detail["round"]) == ([2], 1)
    assert (second.clients, second.detail["round"]) == ([0, 3], 2)
    assert sorted(second.detail["after"]["forgotten"]) == ["0", "2", "3"]
    assert second.detail["after"]["others"]["examples"] == len(federate.worker().slices[1])


def test_recovery_rounds_are_trained_before_a_request_counts_as_done(federate):
    federate("forget.schedule={1:[2]} unlearn.recovery_rounds=1")
    (request,) = federate.requests()
    assert (request.detail["round"], request.detail["completed_round"]) == (1, 2)
    federate("run=short forget.schedule={3:[2]} unlearn.recovery_rounds=5")
    (request,) = federate.requests("short")
    assert (request.state, request.detail["completed_round"]) == (State.COMPLETED, 3)


def test_only_the_last_checkpoint_is_kept(federate):
    federate("forget.schedule={2:[3]}")
    assert [file.name for file in (federate.folder() / "checkpoints").iterdir()] == ["round-00003.safetensors"]


def test_a_share_of_the_clients_trains_and_the_draw_depends_on_the_round_alone(federate):
    grid = federate("fraction=0.5 rounds=6", nodes=4)
    drawn = [row["clients"] for row in federate.run().metrics()]
    assert all(len(clients) == 2 for clients in drawn)
    assert len({tuple(clients) for clients in drawn}) > 1
    again = federate("fraction=0.5 rounds=6 run=again", nodes=4)
    assert kinds(grid) == kinds(again)


# --- clients and nodes that cannot do their part ------------------------------------------------------------------


def test_a_request_that_cannot_be_served_is_refused_with_the_reason(federate):
    federate("forget.schedule={1:[0,1,2,3]}")
    (request,) = federate.requests()
    assert (request.state, request.detail["reason"]) == (State.REFUSED, "no client would be left")


def test_clients_without_examples_take_no_part_and_are_reported(federate, capsys):
    uneven = "partition.kind=class clients=11 data.limit=40 forget.schedule={1:[10]}"
    grid = federate(uneven, nodes=3)
    assert "client 10 has 0 examples: it takes no part" in capsys.readouterr().out
    assert kinds(grid, client=10) == []
    (request,) = federate.requests()
    assert request.detail["reason"] == "client 10 has 0 examples and was never trained on"


def test_a_request_for_a_client_without_examples_too_is_served_for_the_others(federate, capsys):
    grid = federate("partition.kind=class clients=11 data.limit=40 forget.schedule={1:[9,10]}", nodes=3)
    (request,) = federate.requests()
    assert (request.state, request.clients) == (State.COMPLETED, [9, 10])
    assert [list(request.detail[when]["forgotten"]) for when in ("before", "after")] == [["9"], ["9"]]
    assert "client 9: class" in capsys.readouterr().out
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


def test_more_nodes_than_clients_and_one_node_for_all(federate):
    federate("rounds=1", nodes=6)
    federate("rounds=1 run=one", nodes=1)
    assert_close(federate.state("one"), federate.state(), rtol=1e-5, atol=1e-6)


def test_with_bf16_on_the_wire_a_round_moves_the_model_almost_the_same_for_half_the_bytes(federate):
    federate("rounds=1 run=wide")
    federate("rounds=1 run=narrow wire=bf16")
    start, wide, narrow = federate.worker().model.state_dict(), federate.state("wide"), federate.state("narrow")
    name = "class_head.out.bias"
    assert not torch.equal(narrow[name], wide[name])
    error = (narrow[name] - wide[name]).norm() / (wide[name] - start[name]).norm()
    assert error < 0.05
    costs = [federate.run(name).metrics()[0]["train"]["bytes"] for name in ("wide", "narrow")]
    assert costs[1] < 0.53 * costs[0]


def test_a_share_of_the_retained_examples_estimates_their_fisher(federate):
    grids = [federate(f"rounds=1 run=s{i} forget.schedule={{1:[3]}} unlearn.share={s}") for i, s in enumerate((1, 0.3))]
    for grid, share in zip(grids, (1, 0.3), strict=True):
        asked = [wire.task_of(m) for m in grid.sent if m.metadata.message_type == "query.fisher"]
        assert [task.share for task in asked] == [1.0 if 3 in task.clients else share for task in asked]
    details = [federate.requests(f"s{i}")[0].detail for i in range(2)]
    assert details[0]["selected"] != details[1]["selected"]


def test_a_sample_is_part_of_the_clients_examples_in_order(federate):
    worker = federate.worker()
    whole, again = (torch.cat([images for images, _, _ in b]) for b in (worker.sample(1, 1, 5), worker.batches(1)))
    assert torch.equal(whole, again)
    part, same, other = (torch.cat([i for i, _, _ in worker.sample(1, 0.5, r)]) for r in (5, 5, 6))
    assert len(part) == -(-len(whole) // 2)
    assert torch.equal(part, same)
    assert not torch.equal(part, other)
    places = [next(k for k, image in enumerate(whole) if torch.equal(image, chosen)) for chosen in part]
    assert places == sorted(places)
