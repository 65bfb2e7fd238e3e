"""The project's own strategy beside a naive version, on four clients of handwritten digits."""

import math

import pytest
import torch
from torch.testing import assert_close

import reference
from fedunlearn.apps import client_app
from fedunlearn.apps.registry import STRATEGIES
from fedunlearn.federation import messages as wire
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning import retrain_estimate
from fedunlearn.unlearning.null_space import no_products
from fedunlearn.unlearning.pruning import prune_clients
from fedunlearn.unlearning.soft_labels import match_answers
from local_grid import LocalGrid, kinds
from naive import LEAVES, SETTINGS, asked, assert_same, average, before, foretold, forgotten, trained
from strategies.subset import corrected, is_known

pytestmark = pytest.mark.usefixtures("known")


def taught(worker, client, state, leaving, said, views, share, round_):
    """The client's model after one epoch of unseen answers, by hand."""
    worker.model.eval().load_state_dict(state)
    labels = torch.from_numpy(worker.dataset.train.labels[worker.slices[client]])
    draws = generator_of(0, client)
    wanted = match_answers(views, labels, said.class_probs, said.class_labels, share, generator=draws)
    products, staying = {}, [c for c in range(4) if c not in leaving]
    for c in staying:
        sample = torch.cat([images for images, _, _ in worker.sample(c, 0.3, round_)])
        part = worker.examples(c) / sum(map(worker.examples, staying))
        mine = reference.input_products(worker.model, sample)
        products = {name: products.get(name, 0) + part * a for name, a in mine.items()}
    order = torch.randperm(len(labels), generator=generator_of(0, round_, client, 0))
    images = torch.cat([images for images, _, _ in worker.batches(client)])
    settings = worker.config.train
    reference.teach(
        worker.model, images, wanted, reference.projectors(products, ridge=0.1),
        steps=order.split(settings.batch_size), lr=worker.config.unlearn.lr, momentum=settings.momentum,
    )  # fmt: skip
    return {name: value.clone() for name, value in worker.model.state_dict().items()}


@pytest.mark.parametrize("leaving", [[3], [1, 3]])
def test_rounds_of_unseen_answers_correct_each_other(federate, monkeypatch, leaving):
    settings = "unlearn.rounds=2 unlearn.forget_epochs=1 unlearn.round_share=1 unlearn.input_share=0.3"
    settings += " unlearn.ridge=0.1 unlearn.lr=0.005"
    settings += " loss.disentangle_weight=0"  # of hinges: last bits of one round decide in the next
    worker, hits = before(federate, settings), {1: 45, 3: 30}
    counts = {client: Counts(100, 1.0, hits[client], 0) for client in leaving}
    monkeypatch.setattr(STRATEGIES["subset"], "counts_of", lambda *asked: counts)
    # what a model says after two rounds is all alike, and last bits would decide who gets which answer
    sharp = torch.randn(40, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    monkeypatch.setattr(retrain_estimate, "foretold", lambda *asked: sharp)
    state = {n: value.clone() for n, value in worker.model.state_dict().items()}
    said = foretold(federate, worker, leaving)
    predicted = {c: said.expected_accuracy(worker.class_mix([c])) for c in leaving}
    views = {c: worker.views(c) for c in leaving}
    found, detail = forgotten(federate, "subset", settings, leaves=f"forget.schedule={{2:{leaving}}}")
    shares = {
        3: dict.fromkeys(leaving, 1.0),
        4: {c: min(max(2 - hits[c] / 100 / (predicted[c] or hits[c] / 100), 0.0), 1.0) for c in leaving},
    }
    trainable = [name for name, _ in worker.model.named_parameters()]
    for round_ in (3, 4):
        apart = {c: taught(worker, c, state, leaving, said, views[c], shares[round_][c], round_) for c in leaving}
        state |= {n: state[n] + sum(away[n] - state[n] for away in apart.values()) for n in trainable}
        lr = worker.learning_rate(3)
        assert lr > worker.config.unlearn.mend_lr
        state = average(worker, {c: trained(worker, c, state, round_, lr=lr) for c in range(4) if c not in leaving})
    worker.model.load_state_dict(state)
    for client in leaving:
        prune_clients(worker.model, [client])
    assert_same(found, worker.model.state_dict())
    assert detail["predicted"] == pytest.approx(said.expected_accuracy(worker.class_mix(leaving)))


def test_foretold_is_from_what_was_answered_since_the_first_round(federate, monkeypatch):
    worker, asked = before(federate), []
    monkeypatch.setattr(retrain_estimate, "foretold", lambda *given: asked.append(given) or given[0][2])
    _, detail = forgotten(federate, "subset")
    ((answers, labels, everybody, staying),) = asked
    assert answers.keys() == {1, 2}
    assert detail["stored_bytes"] == 2 * 40 * 10 * 2  # rounds, images, classes, bytes
    assert torch.equal(answers[1], federate.beside("before")["answers.1"])
    said = worker.predict_test()
    assert_close(answers[2], said.class_probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, said.class_labels)
    assert torch.equal(everybody, worker.class_mix(range(4)))
    assert torch.equal(staying, worker.class_mix([0, 1, 2]))
    assert detail["predicted"] == pytest.approx(said.expected_accuracy(worker.class_mix([3])))


def test_whoever_was_set_aside_was_trained_on_all_the_same(federate):
    worker, run = before(federate), federate.run("before")
    run.ledger.advance(run.ledger.file([1])[0], State.QUARANTINED)
    run.ledger.advance(run.ledger.file([3])[0], State.COLLECTING)
    strategy, asked = STRATEGIES["subset"](run, worker), []
    strategy.federation.examples = {client: worker.examples(client) for client in range(4)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrain_estimate, "foretold", lambda *given: asked.append(given) or given[0][2])
        strategy.foretold(worker.predict_test())
    ((_, _, everybody, staying),) = asked
    assert torch.equal(everybody, worker.class_mix(range(4)))
    assert torch.equal(staying, worker.class_mix([0, 2]))


def test_a_node_keeps_nothing_of_what_was_said_of_the_leaving_clients_images(federate):
    settings = f"{SETTINGS} strategy=subset unlearn.rounds=2 {LEAVES}"
    kept, grid = [], LocalGrid(2)

    def deliver(message):
        reply = grid.call(message)
        if message.metadata.message_type == "train.unlearn":
            kept.append(sorted(client_app.resident(wire.task_of(message).config)._views))
        return reply

    grid.deliver = deliver
    federate(settings, grid=grid)
    assert kept == [[3], []]


def test_what_another_worker_taught_last_is_not_kept_beyond_the_next_round(federate):
    grid, kept = LocalGrid(2), []

    def deliver(message):
        task, kind = wire.task_of(message), message.metadata.message_type
        worker = client_app.resident(task.config)
        if kind == "train.unlearn":
            reply = grid.call(message)
            worker._views = {3: torch.ones(1)}  # as if the last teaching had been elsewhere
            return reply
        reply = grid.call(message)
        if kind == "train":
            kept.append((task.round, sorted(worker._views)))
        return reply

    grid.deliver = deliver
    federate(f"{SETTINGS} strategy=subset unlearn.rounds=1 rounds=3 {LEAVES}", grid=grid)
    assert (3, [3]) in kept  # while mending
    assert kept[-1] == (3, [])


def test_unseen_answers_are_taught_and_mended_at_their_rates(federate):
    settings = "unlearn.rounds=3 unlearn.lr=0.03 unlearn.mend_lr=0.1 unlearn.hold=0"
    grid = federate(f"{SETTINGS} strategy=subset {settings} {LEAVES}", grid=LocalGrid(4))
    tasks = {(m.metadata.message_type, wire.task_of(m).round): wire.task_of(m).lr for m in grid.sent}
    rates = {kind: {r: lr for (sent, r), lr in tasks.items() if sent == kind and lr >= 0} for kind, _ in tasks}
    assert rates["train.unlearn"] == {3: 0.03, 4: 0.03, 5: 0.03}
    assert rates["train"] == {3: 0.1, 4: 0.1, 5: 0.1}


def test_between_rounds_batchnorm_is_of_a_share_of_the_images_and_in_the_end_of_all(federate):
    settings = "unlearn.rounds=3 unlearn.round_share=0.4 unlearn.recalibrate=true"
    grid = federate(f"{SETTINGS} {settings} strategy=subset {LEAVES}", grid=LocalGrid(4))
    tasks = [wire.task_of(message) for message in grid.sent if message.metadata.message_type == "query.moments"]
    assert [task.share for task in tasks] == [0.4] * 6 + [1.0] * 3  # three stay
    worker = federate.worker(SETTINGS)
    stored, some = (torch.cat([*worker.shuffled_images(0, 3, share)]) for share in (1.0, 0.4))
    assert len(some) == math.ceil(0.4 * len(stored))
    assert {*map(tuple, some.flatten(1).tolist())} < {*map(tuple, stored.flatten(1).tolist())}


def test_every_round_corrects_by_what_all_before_it_missed(federate, monkeypatch):
    worker = before(federate)
    said, state = foretold(federate, worker, [3]), federate.state("before")
    predicted, found = said.expected_accuracy(worker.class_mix([3])), iter([2.0, 1.5, 0.8])
    hits = (100 * times * predicted for times in found)
    monkeypatch.setattr(STRATEGIES["subset"], "counts_of", lambda *asked: {3: Counts(100, 1.0, next(hits), 0)})
    grid = federate(f"{SETTINGS} strategy=subset unlearn.rounds=3 {LEAVES}", grid=LocalGrid(4))
    sent = [message for message in grid.sent if message.metadata.message_type == "train.unlearn"]
    for message, share in zip(sent, [1.0, 0.5, 0.7], strict=True):
        teacher = wire.tensors_of(message, "teacher")
        assert_close(teacher.pop("answers"), said.class_probs, rtol=0.01, atol=1e-3)
        assert torch.equal(teacher.pop("answer_labels"), said.class_labels)
        assert teacher.pop("answer_shares").tolist() == pytest.approx([1, 1, 1, share], rel=1e-4)
        assert_same(teacher, state)


@pytest.mark.parametrize(
    ("aim", "found", "expected"),
    [(0.5, 0.6, 0.4), (0.4, 0.45, 0.45), (0.4, 0.3, 0.5), (0.5, 0.3, 0.5), (0.1, 0.9, 0.0)],
)
def test_by_hand_what_was_too_high_is_aimed_lower_within_what_answers_can_do(aim, found, expected):
    assert corrected(aim, 0.5, found) == pytest.approx(expected)


def test_of_clients_that_leave_together_only_those_that_are_known_are_taught(federate, monkeypatch, capsys):
    monkeypatch.setattr("strategies.subset.is_known", lambda found, *what: found.examples == examples)
    examples = federate.worker(SETTINGS).examples(3)
    grid = federate(f"{SETTINGS} strategy=subset forget.schedule={{2:[1,3]}}", grid=LocalGrid(4))
    assert {client for kind, client in asked(grid) if kind == "train.unlearn"} == {3}
    assert "client 1 is not taught" in capsys.readouterr().out
    assert federate.requests()[0].state == State.COMPLETED


@pytest.mark.parametrize(
    ("schedule", "round_", "teaching", "mending"),
    [
        ("constant", 3, 0.03, 0.04),
        ("steps", 3, 0.06, 0.04),
        ("steps", 4, 0.06, 0.005),
        ("steps", 6, 0.03, 0.005),
        ("cosine", 6, 0.06, 0.00586),
        ("cosine", 8, 0.03, 0.005),
    ],
)
def test_rates_of_unlearning_follow_the_schedule(federate, schedule, round_, teaching, mending):
    federate(f"{SETTINGS} run=other")
    settings = f"rounds=8 train.lr=0.04 train.lr_end=0 train.schedule={schedule} unlearn.lr=0.03 unlearn.mend_lr=0.005"
    strategy = STRATEGIES["subset"](federate.run("other"), federate.worker(settings))
    strategy.config, strategy.round = strategy.worker.config, round_
    assert strategy.rate() == pytest.approx(teaching, rel=0.01)
    assert strategy.mend_rate() == pytest.approx(mending, rel=0.01)


def test_products_of_inputs_travel_in_full_whatever_the_wire(federate):
    _, detail = forgotten(federate, "subset", "wire=bf16 unlearn.rounds=2 unlearn.input_share=0.3")
    products = no_products(federate.worker(SETTINGS).model).values()
    sweep = detail["costs"]["inputs"]
    assert sweep["sweeps"] == 2
    half = 4 * sum(len(a) * (len(a) + 1) // 2 for a in products)
    assert 2 * 2 * half < sweep["bytes"] < 2 * 2 * 1.5 * half  # rounds, nodes


@pytest.mark.parametrize(
    ("hits", "loss", "known"),
    [(60, 0.5, True), (54, 0.5, False), (60, 0.96, False), (60, 0.94, True), (100, 0.96, False)],
)
def test_by_hand_known_is_what_is_surer_and_more_often_right_than_foretold(hits, loss, known):
    assert is_known(Counts(100, 100 * loss, hits, 0), 0.5, 1.0) == known  # a standard error is 0.05


def test_a_client_that_is_known_no_better_than_unseen_images_is_not_taught(federate, monkeypatch):
    monkeypatch.setattr("strategies.subset.is_known", lambda *found: False)
    grid = federate(f"{SETTINGS} strategy=subset {LEAVES}", grid=LocalGrid(4))
    assert not [kind for kind, _ in kinds(grid) if kind == "train.unlearn"]
    (request,) = federate.requests()
    assert request.detail["rounds"] == 0
    left, _ = forgotten(federate, "leave")
    assert_same(federate.state(), left)


def test_the_leaving_client_gets_no_message_after_it_has_taught(federate):
    grid = federate(f"{SETTINGS} rounds=3 strategy=subset unlearn.rounds=2 {LEAVES}", grid=LocalGrid(4))
    mine = [round_ for kind, round_ in kinds(grid, client=3) if kind == "train"]
    assert mine == [1, 2]
    last = max(i for i, message in enumerate(grid.sent) if message.metadata.message_type == "train.unlearn")
    assert all(kind != "train.unlearn" for kind, _ in kinds(grid)[last + 1 :])


def test_clients_of_three_images_mend_and_are_looked_at(federate):
    few = "clients=40 partition.kind=iid unlearn.round_share=0.3 unlearn.recalibrate=true forget.schedule={2:[3]}"
    grid = federate(f"{SETTINGS} {few} strategy=subset", grid=LocalGrid(4))
    (request,) = federate.requests()
    assert (request.state, request.detail.get("attempts")) == (State.COMPLETED, None)
    assert {client for kind, client in asked(grid) if kind == "query.moments"} == {*range(40)} - {3}
