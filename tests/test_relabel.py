"""Relabelling beside a naive version, on four clients of handwritten digits."""

import math

import pytest
import torch
from torch.testing import assert_close

import reference
import strategies.relabel
from fedunlearn.build import learning_rate_of
from fedunlearn.composing import compose
from fedunlearn.federation import messages
from fedunlearn.federation.handle import SERVER
from fedunlearn.federation.rounds import Rounds
from fedunlearn.nn.client_head import train_client_head
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning import batch_norm, soft_labels
from fedunlearn.unlearning.kronecker import zero_factors
from fedunlearn.unlearning.soft_labels import assign_soft_labels, augmented_views
from local_grid import LocalGrid, asked, kinds
from naive import (
    FORGETS,
    ONCE,
    SETTINGS,
    assert_same,
    average,
    before,
    estimated,
    forgotten,
    pruned,
    settings_of,
    trained,
)
from strategies.relabel import Relabelling, corrected, errors_above, fit, is_known_better

pytestmark = pytest.mark.usefixtures("memorised")


def views_of(pooled, client):
    """Mean predictions of the model on shifted versions of the client's images."""
    client = pooled.client(client)
    versions = augmented_views(torch.from_numpy(client.images), mirror=False)
    return torch.stack([client.predict(pooled.model, view.numpy()).class_probs for view in versions]).mean(0)


def projectors_of(pooled, state):
    """tau (A + tau)^-1 of the input covariances A of the server's 30 held-out images at the state."""
    pooled.model.eval().load_state_dict(state)
    batches = [*pooled.server.sample(30, generator_of(0, 2, SERVER, 1))]
    covariances = reference.input_covariances(pooled.model, torch.cat([images for images, _, _ in batches]))
    tau = {name: 0.1 * a.diagonal().mean() for name, a in covariances.items()}
    return {name: tau[name] * torch.linalg.inv(a + tau[name] * torch.eye(len(a))) for name, a in covariances.items()}


def relabelled(pooled, client, state, estimate, fraction, projectors, round_):
    """The client's model after one epoch of fine-tuning on soft labels, by hand."""
    pooled.model.eval().load_state_dict(state)
    views = views_of(pooled, client)
    labels = pooled.client(client).labels
    draws = generator_of(0, client)
    soft_labels = assign_soft_labels(
        views, labels, estimate.class_probs, estimate.class_labels, fraction, generator=draws
    )
    order = torch.randperm(len(labels), generator=generator_of(0, round_, client, 0))
    images = torch.cat([images for images, _, _ in pooled.batches(client)])
    settings = pooled.config.train
    reference.distill(
        pooled.model, images, soft_labels, projectors,
        steps=order.split(settings.batch_size), lr=0.005, momentum=settings.momentum,
    )  # fmt: skip
    return pooled.state()


def telling(counts, forget):
    """A grid on which the clients that are to be forgotten, asked alone, count what `counts(client)` says."""
    grid = LocalGrid(2)

    def deliver(message):
        task, reply = messages.task_of(message), grid.call(message)
        if task.name == "evaluate" and {*task.clients} <= {*forget}:
            told = messages.reply(message, {client: counts(client) for client in task.clients}, weight=1)
            reply.content["metrics"] = told.content["metrics"]
        return reply

    grid.deliver = deliver
    return grid


def whatever_the_model_predicts(views, *given, **named):
    """Assign soft labels to images as if the model predicted something else of them, always the same."""
    random = torch.randn(views.shape, generator=torch.Generator().manual_seed(2))
    return soft_labels.assign_soft_labels(random.softmax(1), *given, **named)


@pytest.mark.parametrize("forget", [[3], [1, 3]])
def test_rounds_of_relabelling_correct_each_other(federate, monkeypatch, forget):
    # of hinges, and at a higher rate, last bits of one round decide in the next
    training = "loss.disentangle_weight=0 train.lr=0.01"
    settings = f"unlearn.rounds=2 unlearn.epochs=1 {ONCE} unlearn.repair_fraction=1 unlearn.guide_images=30"
    settings += " unlearn.ridge=0.1 unlearn.lr=0.005"
    pooled = before(federate, training)
    found = {
        c: Counts(pooled.examples(c), 1.0, round(part * pooled.examples(c))) for c, part in {1: 0.45, 3: 0.3}.items()
    }
    monkeypatch.setattr(messages, "travels_as", lambda name, tensor, dtype: tensor.dtype)  # nothing is rounded to bf16
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)  # nor the guide
    # what a model predicts after two rounds is all alike, and last bits would decide which image gets which soft label
    for module in ("strategies.relabel", __name__):
        monkeypatch.setattr(f"{module}.assign_soft_labels", whatever_the_model_predicts)
    sharp = torch.randn(40, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    monkeypatch.setattr("fedunlearn.federation.handle.estimate_retrained", lambda *given: sharp)
    state = pooled.state()
    estimate = pooled.predictions()._replace(class_probs=sharp)
    predicted = {c: estimate.expected_accuracy(pooled.class_counts([c])) for c in forget}
    grid = telling(found.get, forget)
    forgets = f"forget.schedule={{2:{forget}}}"
    state_after, detail = forgotten(federate, "relabel", settings, training=training, forgets=forgets, grid=grid)
    fractions = {
        3: dict.fromkeys(forget, 1.0),
        4: {c: corrected(1.0, predicted[c], found[c].class_accuracy) for c in forget},
    }
    trainable = [name for name, _ in pooled.model.named_parameters()]
    retain = [c for c in range(4) if c not in forget]
    projectors = projectors_of(pooled, state)
    for round_ in (3, 4):
        apart = {c: relabelled(pooled, c, state, estimate, fractions[round_][c], projectors, round_) for c in forget}
        state |= {n: state[n] + sum(end[n] - state[n] for end in apart.values()) for n in trainable}
        lr = learning_rate_of(pooled.config, 3)
        assert lr > 0.005  # the repair's own
        state = average(pooled, {c: trained(pooled, c, state, round_, lr=lr) for c in retain})
    start, expected = federate.state("before"), pruned(state, *forget)
    for layer in {name.rpartition(".")[0] for name in trainable}:  # a hinge can decide alone where a bias goes
        off, moved = (
            sum(float((expected[n] - found[n]).square().sum()) for n in trainable if n.rpartition(".")[0] == layer)
            for found in (state_after, start)
        )
        assert off <= 0.02**2 * moved, layer
    assert_same(state_after, expected, atol=1e-4)
    assert detail["predicted"] == pytest.approx(estimate.expected_accuracy(pooled.class_counts(forget)))


def test_the_estimate_is_from_predictions_since_the_first_round(federate, monkeypatch):
    pooled, estimates = before(federate), []
    monkeypatch.setattr(
        "fedunlearn.federation.handle.estimate_retrained", lambda *given: estimates.append(given) or given[0][2]
    )
    _, detail = forgotten(federate, "relabel", f"unlearn.rounds=1 unlearn.epochs=1 {ONCE}")
    ((predictions, labels, counts_before, counts_after),) = estimates
    assert predictions.keys() == {1, 2}
    assert detail["stored_bytes"] == 2 * 40 * 10 * 2  # rounds, images, classes, bytes
    assert torch.equal(predictions[1], federate.server_state("before").predictions["1"])
    found = pooled.predictions()
    assert_close(predictions[2], found.class_probs, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, found.class_labels)
    assert torch.equal(counts_before, pooled.class_counts(range(4)))
    assert torch.equal(counts_after, pooled.class_counts([0, 1, 2]))
    assert detail["predicted"] == pytest.approx(found.expected_accuracy(pooled.class_counts([3])))


def test_whoever_was_set_aside_was_trained_on_all_the_same(federate, monkeypatch):
    pooled, estimates = before(federate), []
    run = federate.run("before")
    run.ledger.advance(run.ledger.file([1])[0], State.QUARANTINED)
    run.ledger.advance(run.ledger.file([3])[0], State.COLLECTING)
    federation = Rounds.assemble(run).federation
    federation.grid = LocalGrid(2)
    federation.nodes.identify(federation.grid, {})
    monkeypatch.setattr(
        "fedunlearn.federation.handle.estimate_retrained", lambda *given: estimates.append(given) or given[0][2]
    )
    federation.estimate_retrained(federation.predictions())
    ((_, _, counts_before, counts_after),) = estimates
    assert torch.equal(counts_before, pooled.class_counts(range(4)))
    assert torch.equal(counts_after, pooled.class_counts([0, 2]))


@pytest.mark.slow
def test_relabelling_and_repair_have_their_rates(federate):
    settings = (
        f"unlearn.rounds=2 unlearn.epochs=1 {ONCE} unlearn.lr=0.03 unlearn.repair_lr=0.1 unlearn.freeze_fraction=0"
    )
    grid = LocalGrid(1)
    forgotten(federate, "relabel", settings, grid=grid)
    rates = {
        name: {messages.task_of(m).round: messages.arguments_of(m)["lr"] for m in grid.sent_for(name)}
        for name in ("relabel", "repair")
    }
    assert rates["relabel"] == {3: 0.03, 4: 0.03}
    assert rates["repair"] == {3: 0.1, 4: 0.1}


@pytest.mark.slow
def test_batchnorm_statistics_are_estimated_by_clients_before_a_request_and_in_the_end(federate):
    settings = f"unlearn.rounds=2 unlearn.epochs=1 {ONCE} batch_norm_fraction=0.4"
    grid = LocalGrid(1)
    forgotten(federate, "relabel", settings, grid=grid)
    fractions = [messages.arguments_of(message)["fraction"] for message in grid.sent_for("batch_norm_statistics")]
    assert fractions == [0.4] * 2
    client = federate.pooled(SETTINGS).client(0, 3)
    stored, some = (torch.cat([*client.shuffled_images(fraction)]) for fraction in (1.0, 0.4))
    assert len(some) == math.ceil(0.4 * len(stored))
    assert {*map(tuple, some.flatten(1).tolist())} < {*map(tuple, stored.flatten(1).tolist())}


@pytest.mark.slow
def test_every_round_corrects_by_what_all_before_it_missed(federate):
    pooled = before(federate)
    estimate, state = estimated(federate, pooled, [3]), federate.state("before")
    predicted, examples = estimate.expected_accuracy(pooled.class_counts([3])), pooled.examples(3)
    hits = [round(examples * predicted) + 4, round(examples * predicted) + 2, 0, 0]
    found = iter(hits)
    grid = telling(lambda client: Counts(examples, 1.0, next(found), 0), [3])
    forgotten(federate, "relabel", f"unlearn.rounds=3 unlearn.epochs=1 {ONCE}", grid=grid)
    sent = grid.sent_for("relabel")
    assert_same(messages.unpack(sent[0]), state)
    second = 1 - (hits[1] / examples - predicted) / (2 * predicted)
    third = second - (hits[2] / examples - predicted) / (2 * predicted)
    assert second < third
    for message, fraction in zip(sent, [1.0, second, min(third, 1.0)], strict=True):
        arguments = messages.arguments_of(message)
        assert_close(arguments["predictions"], estimate.class_probs, rtol=0.01, atol=1e-3)
        assert torch.equal(arguments["prediction_labels"], estimate.class_labels)
        assert arguments["correct_fraction"] == {"3": pytest.approx(fraction, rel=1e-4)}


def test_soft_labels_of_whoever_is_not_asked_in_a_round_stay_as_they_were(federate, monkeypatch):
    half = torch.arange(40)[:, None] % 2 * torch.ones(10)  # of the held-out images are right in the estimate
    monkeypatch.setattr(
        "fedunlearn.federation.handle.estimate_retrained",
        lambda found, labels, *counts: half * torch.eye(10)[labels] + torch.eye(10)[(labels + 1) % 10] / 2,
    )
    sizes = {c: federate.pooled(SETTINGS).examples(c) for c in (1, 3)}
    right = {1: iter([1, 1, 0, 1, 0]), 3: iter([1, 1, 1, 0, 0])}  # of each client's images, before and after each round
    grid = telling(lambda client: Counts(sizes[client], 1.0, sizes[client] * next(right[client])), [1, 3])
    settings = "unlearn.rounds=1 unlearn.most_rounds=4 unlearn.epochs=1 unlearn.passes=1"
    forgotten(federate, "relabel", settings, forgets="forget.schedule={2:[1,3]}", grid=grid)
    sent = {messages.task_of(m).round: messages.arguments_of(m)["correct_fraction"] for m in grid.sent_for("relabel")}
    assert [set(fractions) for fractions in sent.values()] == [{"1", "3"}, {"1", "3"}, {"3"}, {"1"}]
    assert sent[4]["1"] < 0.8
    assert sent[6]["1"] == min(1.0, sent[4]["1"] + 0.5)  # in round 4 none was right, and in round 5 it was not asked


@pytest.mark.parametrize(
    ("correct", "found", "expected"),
    [(1.0, 0.6, 0.9), (0.9, 0.6, 0.8), (0.8, 0.3, 1.0), (1.0, 0.3, 1.0), (0.2, 1.0, 0.0)],
)
def test_by_hand_half_of_the_overshoot_is_corrected_within_what_soft_labels_can_do(correct, found, expected):
    assert corrected(correct, 0.5, found) == pytest.approx(expected)


def test_where_nothing_is_to_be_right_no_soft_label_is():
    assert corrected(1.0, 0.0, 0.3) == 0.0


def test_of_clients_that_are_forgotten_together_only_memorised_ones_are_relabelled(federate, monkeypatch, capsys):
    examples = federate.pooled(SETTINGS).examples(3)
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda found, *other: found.examples == examples)
    grid = LocalGrid(1)
    settings = f"unlearn.rounds=1 unlearn.epochs=1 {ONCE}"
    forgotten(federate, "relabel", settings, forgets="forget.schedule={2:[1,3]}", grid=grid)
    assert {client for task, client in asked(grid) if task == "relabel"} == {3}
    assert "client 1 is not relabelled" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lr", "chosen", "repair"), [(0.02, None, 0.005), (0.05, None, 0.005), (0.01, None, 0.0025), (0.01, 0.03, 0.03)]
)
def test_a_network_that_is_trained_at_a_low_rate_is_repaired_at_a_low_one(digits, lr, chosen, repair):
    config = compose(digits, f"rounds=8 train.lr={lr} train.lr_end=0")
    strategy = Relabelling(Relabelling.Settings(repair_lr=chosen))
    assert strategy.repair_lr(config, 8) == pytest.approx(repair)


@pytest.mark.parametrize(
    ("schedule", "round_", "relabel", "repair"),
    [
        ("constant", 3, 0.03, 0.04),
        ("steps", 3, 0.06, 0.04),
        ("steps", 4, 0.06, 0.005),
        ("steps", 6, 0.03, 0.005),
        ("cosine", 6, 0.06, 0.00586),
        ("cosine", 8, 0.03, 0.005),
    ],
)
def test_rates_of_unlearning_follow_the_schedule(digits, schedule, round_, relabel, repair):
    config = compose(digits, f"rounds=8 train.lr=0.04 train.lr_end=0 train.schedule={schedule}")
    strategy = Relabelling(Relabelling.Settings(lr=0.03, repair_lr=0.005))
    assert strategy.relabel_lr(config, round_) == pytest.approx(relabel, rel=0.01)
    assert strategy.repair_lr(config, round_) == pytest.approx(repair, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["inputs", "kronecker", "diagonal"])
def test_the_guide_travels_to_forget_clients_alone_in_half_precision(federate, guide):
    grid = LocalGrid(2)
    forgotten(
        federate,
        "relabel",
        f"unlearn.rounds=1 unlearn.epochs=1 {ONCE} unlearn.guide={guide}",
        grid=grid,
    )
    (message,) = [sent for sent in grid.sent if "guide" in messages.arguments_of(sent)]
    assert (messages.task_of(message).name, messages.task_of(message).clients) == ("relabel", [3])
    sent = messages.arguments_of(message)["guide"]
    assert {values.dtype for values in sent.values()} == {torch.float16}
    zeros = zero_factors(federate.pooled(SETTINGS).model)
    if guide != "diagonal":
        named = {name for name in zeros if guide == "kronecker" or name.endswith(".inputs")}
        assert {name: len(values) for name, values in sent.items()} == {
            name: len(zeros[name]) * (len(zeros[name]) + 1) // 2 for name in named
        }


@pytest.mark.parametrize(
    ("hits", "loss", "memorised"),
    [(60, 0.5, True), (54, 0.5, False), (60, 0.96, False), (60, 0.94, True), (100, 0.96, False)],
)
def test_by_hand_memorised_is_what_is_surer_and_more_often_right_than_estimated(hits, loss, memorised):
    assert is_known_better(Counts(100, 100 * loss, hits, 0), 0.5, 1.0) == memorised  # a standard error is 0.05


def test_a_client_that_is_known_no_better_than_held_out_images_is_not_relabelled(federate, monkeypatch):
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: False)
    grid = LocalGrid(1)
    found, detail = forgotten(federate, "relabel", grid=grid)
    assert not grid.sent_for("relabel")
    assert detail["relabelled"] == []
    plain, _ = forgotten(federate, "leave", run="plain")
    assert_same(found, plain)


@pytest.mark.parametrize(("memorised", "frozen"), [(-0.1, 0.0), (0.2, 0.0), (0.3, 0.5), (1.0, 0.5)])
def test_weights_freeze_only_where_something_was_memorised(federate, monkeypatch, memorised, frozen):
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    monkeypatch.setattr("strategies.relabel.memorised_fraction", lambda *found: memorised)
    _, detail = forgotten(
        federate,
        "relabel",
        f"unlearn.rounds=1 unlearn.epochs=1 {ONCE} unlearn.freeze_fraction=0.5",
    )
    masks = [mask.flatten() for mask in federate.server_state("forgets").frozen.values()]
    assert detail["frozen"] == frozen
    assert bool(masks) == bool(frozen)
    if frozen:
        assert float(torch.cat(masks).double().mean()) == pytest.approx(frozen, abs=0.02)


def test_where_nobody_is_relabelled_the_client_head_is_trained_anew_all_the_same(federate, monkeypatch):
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: False)
    training = "train.client_head_by=server"
    found, _ = forgotten(federate, "relabel", training=training)
    start = federate.state("before")
    assert not torch.equal(found["client_head.hidden.weight"], start["client_head.hidden.weight"])
    assert torch.equal(found["class_head.out.weight"], start["class_head.out.weight"])


@pytest.mark.slow
def test_a_repair_works_with_statistics_of_held_out_images_and_the_last_one_trains_the_client_head(federate):
    training = "train.client_head_by=server batch_norm_fraction=0.4"
    settings = f"unlearn.rounds=2 unlearn.epochs=1 {ONCE} unlearn.repair_lr=0.001 unlearn.freeze_fraction=0"
    grid = LocalGrid(1)
    found, _ = forgotten(federate, "relabel", settings, training=training, grid=grid)
    first, last = grid.sent_for("repair")
    assert [messages.arguments_of(message)["embeddings"] for message in (first, last)] == [False, True]
    pooled = before(federate, training)
    for message in (first, last):
        sent = messages.unpack(message)
        pooled.model.load_state_dict(sent)
        images = (images for images, _, _ in pooled.server.sample(500, generator_of(0, 2, SERVER)))
        batch_norm.recalibrate(pooled.model, batch_norm.batch_statistics(pooled.model, images))
        assert_same(pooled.state(), sent)
    statistics = {c: pooled.client(c, 4).embedding_statistics(pooled.model) for c in (0, 1, 2)}
    steps = pooled.config.train.client_head_steps
    train_client_head(pooled.model.client_head, statistics, steps=steps, generator=generator_of(0, 4, SERVER))
    wanted = pruned(pooled.state())
    assert_close(found["client_head.hidden.weight"], wanted["client_head.hidden.weight"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_forget_client_gets_no_message_after_it_has_said_what_came_of_it(federate):
    grid = LocalGrid(1)
    settings = settings_of("relabel", f"unlearn.rounds=2 unlearn.epochs=1 {ONCE}")
    federate(f"{settings} rounds=3 {FORGETS}", grid=grid)
    assert [round_ for task, round_ in kinds(grid, client=3) if task == "train"] == [1, 2]
    assert [task for task, _ in kinds(grid, client=3)[-2:]] == ["relabel", "evaluate"]
    last = max(place for place, message in enumerate(grid.sent) if 3 in messages.task_of(message).clients)
    assert "train" in {messages.task_of(message).name for message in grid.sent[last + 1 :]}


@pytest.mark.slow
def test_clients_of_three_images_repair_and_give_statistics(federate):
    training = "clients=10 data.limit=30 partition.kind=iid"
    settings = f"unlearn.epochs=1 {ONCE} unlearn.repair_fraction=0.3 batch_norm_fraction=0.1"
    grid = LocalGrid(1)
    _, detail = forgotten(federate, "relabel", settings, training=training, grid=grid)
    assert detail.get("attempts") is None
    assert {client for task, client in asked(grid) if task == "batch_norm_statistics"} == {*range(10)} - {3}


def test_a_pass_that_comes_no_nearer_is_undone_and_followed_by_one_of_a_quarter_of_its_rate(federate, monkeypatch):
    rates, real = [], strategies.relabel.distill

    def failing(model, batches, *, lr, **others):
        rates.append(lr)
        if len(rates) < 3:
            value = math.nan if len(rates) == 1 else 0.0  # it diverges, and says the same of all images
            with torch.no_grad():
                model.class_head.out.weight.fill_(value)
                model.class_head.out.bias.copy_(torch.tensor([9.0] + [0.0] * 9))
        else:
            real(model, batches, lr=lr, **others)

    monkeypatch.setattr("strategies.relabel.distill", failing)
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    pooled = before(federate)
    settings = "unlearn.rounds=1 unlearn.most_rounds=1 unlearn.passes=3 unlearn.lr=0.04 unlearn.freeze_fraction=0"
    found, detail = forgotten(federate, "relabel", f"{settings} unlearn.repair_lr=0 train.lr=0")
    assert rates == pytest.approx([0.04, 0.01, 0.0025])
    start, end = (state["class_head.out.weight"] for state in (pooled.state(), found))
    assert 0 < float((end - start).norm()) < 0.1 * float(start.norm())
    assert detail["relabelled"] == [3]


def test_a_round_has_passes_at_twice_the_rate_until_no_more_images_are_right_than_soft_labels(federate, monkeypatch):
    rates, fits = [], iter([(9.0, 4.0), (9.0, 3.0), (1.01, 2.0), (1.0, 1.0)])
    monkeypatch.setattr("strategies.relabel.distill", lambda *given, lr, **others: rates.append(lr))
    monkeypatch.setattr("strategies.relabel.fit", lambda *given: next(fits))
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    forgotten(federate, "relabel", "unlearn.rounds=1 unlearn.most_rounds=1 unlearn.lr=0.04")
    assert rates == pytest.approx([0.04, 0.08, 0.16])


def test_how_a_model_fits_soft_labels_equals_a_naive_count(federate):
    pooled = before(federate)
    client, soft_labels = pooled.client(3), torch.randn(pooled.examples(3), 10).softmax(1)
    probs = client.predict(pooled.model, client.images).class_probs
    labels = client.labels.tolist()
    right = sum(int(p.argmax()) == k for p, k in zip(probs, labels, strict=True)) / len(probs)
    aim = sum(int(t.argmax()) == k for t, k in zip(soft_labels, labels, strict=True)) / len(probs)
    loss = -sum(float(t @ p.log()) for t, p in zip(soft_labels, probs, strict=True)) / len(probs)
    error = math.sqrt(max(aim * (1 - aim), 1 / len(probs)) / len(probs))
    assert fit(client, pooled.model, soft_labels) == pytest.approx(((right - aim) / error, loss), rel=1e-4, abs=1e-6)


def test_rounds_go_on_until_clients_are_known_no_better_than_estimated(federate, capsys):
    pooled = before(federate)
    predicted = estimated(federate, pooled, [3]).expected_accuracy(pooled.class_counts([3]))
    examples = pooled.examples(3)
    limit = predicted + 2 * math.sqrt(predicted * (1 - predicted) / examples)
    above, below = math.floor(limit * examples) + 1, math.floor(limit * examples)
    settings = "unlearn.rounds=2 unlearn.epochs=1 unlearn.passes=1 unlearn.most_rounds="
    for most, hits, rounds in ((5, [above, above, below], 3), (5, [above, below], 2), (3, [above] * 3, 3)):
        found, grid = iter([examples, *hits]), None
        grid = telling(lambda client, found=found: Counts(examples, 1.0, next(found), 0), [3])
        forgotten(federate, "relabel", f"{settings}{most}", run=f"{most}-{len(hits)}", grid=grid)
        sent = grid.sent_for("repair")
        assert len(grid.sent_for("relabel")) == rounds
        trained = [messages.arguments_of(message)["embeddings"] for message in sent[:: len(sent) // rounds]]
        assert trained == [False] + [True] * (rounds - 1)
        assert ("still known better" in capsys.readouterr().err) == (hits[-1] == above)


def test_further_rounds_are_of_those_alone_who_are_still_known_better(federate, monkeypatch):
    examples, grid = federate.pooled(SETTINGS).examples(3), LocalGrid(1)
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    monkeypatch.setattr("strategies.relabel.errors_above", lambda found, aim: 9.0 * (found.examples == examples))
    settings = "unlearn.rounds=1 unlearn.most_rounds=2 unlearn.epochs=1 unlearn.passes=1"
    forgotten(federate, "relabel", settings, forgets="forget.schedule={2:[1,3]}", grid=grid)
    clients = {3: set(), 4: set()}
    for task in map(messages.task_of, grid.sent_for("relabel")):
        clients[task.round] |= {*task.clients}
    assert clients == {3: {1, 3}, 4: {3}}


@pytest.mark.parametrize(
    ("hits", "predicted", "expected"), [(60, 0.5, 2.0), (40, 0.5, -2.0), (0, 0.0, 0.0), (2, 0.0, 2.0), (98, 1.0, -2.0)]
)
def test_by_hand_standard_errors_above_an_estimate(hits, predicted, expected):
    assert errors_above(Counts(100, class_correct=hits), predicted) == pytest.approx(expected)
