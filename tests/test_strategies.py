"""Every strategy beside a naive version of it, on a federation of four clients of handwritten digits."""

import math
from dataclasses import fields

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import reference
from fedunlearn import checkpoint, client_app, unseen
from fedunlearn.config import STRATEGIES as NAMES
from fedunlearn.config import Unlearn
from fedunlearn.dampening import largest_alpha
from fedunlearn.evaluate import Counts
from fedunlearn.ledger import Ledger, State
from fedunlearn.null_space import no_products
from fedunlearn.pruning import prune_clients
from fedunlearn.runs import Run
from fedunlearn.train import generator_of
from fedunlearn.unseen import less_right, match_answers
from fedunlearn.worker import model_of
from local_grid import LocalGrid, equal, kinds
from strategies import fed_eraser, wire
from strategies.catalogue import STRATEGIES
from strategies.ordered_grid import OrderedGrid
from strategies.ssd import BISECTED, EVALUATIONS, nearest
from strategies.subset_unlearning import corrected, is_known

SETTINGS = "rounds=2 train.client_head=local train.server_momentum=0.5 unlearn.recover=1 unlearn.recalibrate=false"
LEAVES = "forget.schedule={2:[3]}"


pytestmark = pytest.mark.usefixtures("known")


def before(federate, more=""):
    """A worker that holds the model as it was when the request came."""
    federate(f"{SETTINGS} {more} run=before")
    worker = federate.worker(f"{SETTINGS} {more}")
    worker.model.load_state_dict(federate.state("before"))
    return worker


def forgotten(federate, strategy, more="", leaves=LEAVES):
    federate(f"{SETTINGS} {more} strategy={strategy} {leaves} run={strategy}")
    (request,) = federate.requests(strategy)
    assert request.state == State.COMPLETED
    return federate.state(strategy), request.detail


def asked(grid):
    """(kind, client) of every message, for each client that it names."""
    tasks = [(message.metadata.message_type, wire.task_of(message)) for message in grid.sent]
    return [(kind, client) for kind, task in tasks for client in task.clients]


def trained(worker, client, state, round_, **task):
    """The client's model after its training of a round."""
    worker.model.load_state_dict(state)
    worker.fit(client, round_, **task)
    return {name: value.clone() for name, value in worker.model.state_dict().items()}


def average(worker, states):
    """Of the states of clients, by examples."""
    total = sum(worker.examples(c) for c in states)
    first = next(iter(states.values()))
    floating = {name for name, value in first.items() if value.is_floating_point()}
    return {
        name: sum(worker.examples(c) / total * state[name] for c, state in states.items())
        if name in floating
        else value
        for name, value in first.items()
    }


def pruned(worker, state, client=3):
    worker.model.load_state_dict(state)
    prune_clients(worker.model, [client])
    return worker.model.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_every_name_has_its_strategy():
    assert tuple(STRATEGIES) == NAMES


def test_leaving_changes_nothing_but_the_neuron(federate):
    worker = before(federate)
    found, _ = forgotten(federate, "leave")
    assert equal(found, dict(pruned(worker, worker.model.state_dict())))


def test_retraining_is_the_run_in_which_the_client_never_took_part(federate):
    found, detail = forgotten(federate, "retrain")
    ledger = Ledger(federate.folder("gold") / "ledger.sqlite")
    ledger.file([3])
    ledger.close()
    federate(f"{SETTINGS} strategy=leave run=gold")
    assert equal(found, federate.state("gold"))
    assert detail["retrained"] == 2


def test_negation_turns_the_first_layer_and_trains_on(federate):
    worker = before(federate)
    found, _ = forgotten(federate, "negate")
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    state["stem.0.weight"] = -state["stem.0.weight"]
    lr = worker.config.unlearn.recover_lr
    state = average(worker, {c: trained(worker, c, state, 3, lr=lr) for c in range(3)})
    assert_same(found, pruned(worker, state))


def naive_ascent(worker, client, state, *, radius=torch.inf):
    """Clipped steps up the class loss, each projected; without an early end."""
    worker.model.load_state_dict(state)
    model, settings = worker.model, worker.config.unlearn
    start = [p.detach().clone() for p in model.parameters()]
    for epoch in range(settings.ascent_epochs):
        for images, labels, _ in worker.batches(client, generator_of(worker.config.seed, 2, client, epoch)):
            model.train()
            model.zero_grad()
            cross_entropy(model(images).class_logits, labels).backward()
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p += settings.ascent_lr * g * min(1, settings.clip / norm)
                away = torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]).norm()
                for p, s in zip(model.parameters(), start, strict=True):
                    p.copy_(s + (p - s) * min(1, radius / away))
    return {name: value.clone() for name, value in model.state_dict().items()}


ASCENT = "unlearn.recover=0 unlearn.ascent_epochs=1 unlearn.ascent_lr=0.05"


def test_ascent_climbs_the_leaving_clients_loss(federate, monkeypatch):
    monkeypatch.setattr("strategies.forgetting.Forgetting.foretold_accuracy", lambda self, clients: -1.0)
    worker = before(federate, ASCENT)
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    losses = [worker.evaluate(3).mean_loss]
    found, _ = forgotten(federate, "ascent", ASCENT)
    climbed = naive_ascent(worker, 3, state)
    losses.append(worker.evaluate(3).mean_loss)
    assert_same(found, pruned(worker, climbed))
    assert losses[1] > losses[0]


def test_an_ascent_ends_when_the_accuracy_is_that_of_unseen_images(federate):
    worker = before(federate)
    predicted = foretold(federate, worker, [3]).expected_accuracy(worker.class_mix([3]))
    _, detail = forgotten(federate, "ascent", "unlearn.recover=0 unlearn.ascent_epochs=1000 unlearn.ascent_lr=0.01")
    assert detail["until"] == pytest.approx(predicted)
    assert detail["after"]["forgotten"]["3"]["class"] < 1


def test_projected_ascent_stays_in_its_ball_around_the_others_mean(federate, monkeypatch):
    monkeypatch.setattr("strategies.forgetting.Forgetting.foretold_accuracy", lambda self, clients: -1.0)
    monkeypatch.setattr("strategies.projected_ascent.ProjectedAscent.radius", lambda self: 0.02)
    worker = before(federate, ASCENT)
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    found, _ = forgotten(federate, "pga", ASCENT)
    own = trained(worker, 3, state, 2)
    n, rest = worker.examples(3), sum(worker.examples(c) for c in range(3))
    reference = {
        name: ((n + rest) * value - n * own[name]) / rest if value.is_floating_point() else value
        for name, value in state.items()
    }
    expected = naive_ascent(worker, 3, reference, radius=0.02)
    assert_same(found, pruned(worker, expected))


def test_the_balls_radius_is_of_the_others_mean(federate, monkeypatch):
    asked = []

    def radius(strategy):
        asked.append({name: value.clone() for name, value in strategy.model.state_dict().items()})
        return 0.02

    monkeypatch.setattr("strategies.projected_ascent.ProjectedAscent.radius", radius)
    worker = before(federate)
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    own, share = trained(worker, 3, state, 2), worker.examples(3) / sum(worker.examples(c) for c in range(3))
    forgotten(federate, "pga", "unlearn.recover=0 unlearn.ascent_epochs=1")
    floating = {name for name, value in state.items() if value.is_floating_point()}
    assert_same(asked[0], {n: v - share * (own[n] - v) if n in floating else v for n, v in state.items()})


def test_the_ball_is_a_third_of_the_way_to_random_models(federate):
    worker = before(federate)
    run = Run.opened(federate.folder("before"))
    strategy = STRATEGIES["pga"](run, federate.worker(SETTINGS))
    own = torch.cat([p.detach().flatten() for p in worker.model.parameters()])
    distances = [
        torch.cat([p.detach().flatten() for p in model_of(worker.config, worker.dataset, 1, i).parameters()])
        .sub(own)
        .norm()
        for i in range(10)
    ]
    assert strategy.radius() == pytest.approx(float(torch.stack(distances).mean()) / 3, rel=1e-4)


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


def foretold(federate, worker, leaving):
    """What the model would say of unseen images had it never seen those clients'."""
    said, everybody = worker.predict_test(), worker.class_mix(range(4))
    answers = {1: federate.beside("before")["answers.1"], 2: said.class_probs}
    staying = worker.class_mix(set(range(4)) - set(leaving))
    return said._replace(class_probs=unseen.foretold(answers, said.class_labels, everybody, staying))


def taught(worker, client, state, leaving, said, views, share, round_):
    """The client's model after one epoch of unseen answers, by hand."""
    worker.model.eval().load_state_dict(state)
    labels = torch.from_numpy(worker.dataset.train.labels[worker.slices[client]])
    kept = less_right(said.class_probs, said.class_labels, share)
    draw = generator_of(0, round_, client)
    wanted = match_answers(views, labels, said.class_probs[kept], said.class_labels[kept], generator=draw)
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
    settings += " unlearn.ridge=0.1 unlearn.lr=0.02"
    settings += " loss.disentangle_weight=0"  # of hinges: last bits of one round decide in the next
    worker, hits = before(federate, settings), {1: 45, 3: 30}
    counts = {client: Counts(100, 1.0, hits[client], 0) for client in leaving}
    monkeypatch.setattr(STRATEGIES["subset"], "counts_of", lambda *asked: counts)
    # what a model says after two rounds is all alike, and last bits would decide who gets which answer
    sharp = torch.randn(40, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    monkeypatch.setattr(unseen, "foretold", lambda *asked: sharp)
    state = {n: value.clone() for n, value in worker.model.state_dict().items()}
    said = foretold(federate, worker, leaving)
    predicted = {c: said.expected_accuracy(worker.class_mix([c])) for c in leaving}
    views = {c: worker.views(c, generator_of(0, c)) for c in leaving}
    found, detail = forgotten(federate, "subset", settings, leaves=f"forget.schedule={{2:{leaving}}}")
    shares = {
        3: dict.fromkeys(leaving, 1.0),
        4: {c: 2 - hits[c] / 100 / (predicted[c] or hits[c] / 100) for c in leaving},
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
    monkeypatch.setattr(unseen, "foretold", lambda *given: asked.append(given) or given[0][2])
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
        patch.setattr(unseen, "foretold", lambda *given: asked.append(given) or given[0][2])
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
    monkeypatch.setattr("strategies.subset_unlearning.is_known", lambda found, *what: found.examples == examples)
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
    monkeypatch.setattr("strategies.subset_unlearning.is_known", lambda *found: False)
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


def test_the_strength_of_dampening_is_chosen_without_gold(federate):
    settings = "unlearn.tune=auto unlearn.exponent=2 evaluate_every=1"
    grid = federate(f"{SETTINGS} strategy=ssd {settings} {LEAVES}", grid=LocalGrid(4))
    (request,) = federate.requests()
    trials, predicted = request.detail["trials"], request.detail["predicted"]
    assert len(trials) == EVALUATIONS == 8
    limit = largest_alpha(120, 28)  # examples of all, and of client 3
    assert trials[0]["alpha"] == limit
    firsts = {trial["lambda_"]: trial["alpha"] for trial in reversed(trials[1:])}
    assert firsts == pytest.approx({lambda_: math.sqrt(lambda_ * limit) for lambda_ in BISECTED})
    chosen = nearest(trials, predicted)
    assert (request.detail["alpha"], request.detail["lambda_"]) == (chosen["alpha"], chosen["lambda_"])
    asked = [kind for kind, _ in kinds(grid, client=3)[kinds(grid, client=3).index(("query.fisher", 2)) :]]
    assert asked == ["query.fisher", *["evaluate"] * EVALUATIONS]
    after = request.detail["after"]
    assert after["forgotten"]["3"]["class"] == pytest.approx(chosen["forgotten"])
    assert after["test"]["class"] == pytest.approx(chosen["test"])


def test_dampening_nothing_is_tried_too(federate):
    worker, run = before(federate), federate.run("before")
    strategy = STRATEGIES["ssd"](run, federate.worker(SETTINGS))
    grid = OrderedGrid(LocalGrid(4), window=8)
    strategy.federation.identify(grid)
    run.ledger.advance(run.ledger.file([3])[0], State.COLLECTING)
    full, forget = strategy.fishers([3], grid, {})
    known = strategy.worker.evaluate(3).class_accuracy
    assert strategy.search([3], full, forget, known, grid, {})[0]["forgotten"] == known
    assert_same(strategy.model.state_dict(), worker.model.state_dict())


def test_clients_of_three_images_mend_and_are_looked_at(federate):
    few = "clients=40 partition.kind=iid unlearn.round_share=0.3 unlearn.recalibrate=true forget.schedule={2:[3]}"
    grid = federate(f"{SETTINGS} {few} strategy=subset", grid=LocalGrid(4))
    (request,) = federate.requests()
    assert (request.state, request.detail.get("attempts")) == (State.COMPLETED, None)
    assert {client for kind, client in asked(grid) if kind == "query.moments"} == {*range(40)} - {3}


def test_a_round_in_which_only_leaving_clients_trained_is_not_replayed(federate):
    settings = "strategy=federaser unlearn.every=1 rounds=4 fraction=0.25 train.client_head=local"
    federate(f"{settings} run=before")
    trained = [row["clients"] for row in federate.run("before").metrics() if row["kind"] == "round"]
    once = next(clients for clients in trained if trained.count(clients) == 1)
    federate(f"{settings} forget.schedule={{4:{once}}}")
    (request,) = federate.requests()
    assert (request.state, request.detail["replayed"]) == (State.COMPLETED, 3)


def test_of_trials_near_the_target_the_best_on_unseen_images_is_chosen():
    trials = [{"forgotten": f, "test": t} for f, t in ((0.50, 0.1), (0.515, 0.3), (0.49, 0.2), (0.6, 0.9))]
    assert nearest(trials, 0.5)["test"] == 0.3
    assert nearest(trials, 0.7)["test"] == 0.9


OTHERS = {
    "alpha": 3.0, "lambda_": 0.2, "exponent": 2.0, "head": "client", "estimator": "batch", "precision": "bf16",
    "share": 0.5, "tune": "fixed", "rounds": 1, "round_share": 0.7, "input_share": 0.3, "ridge": 0.5,
    "forget_epochs": 1, "views": 1, "flip": "true", "hold": 0.1, "lr": 0.03, "mend_lr": 0.02, "recover": 2,
    "recover_lr": 0.02, "ascent_epochs": 2, "ascent_lr": 0.01, "clip": 0.1, "every": 1, "calibration": 0.9,
    "recalibrate": "true",
}  # fmt: skip


@pytest.mark.parametrize("strategy", NAMES)
def test_a_strategy_depends_on_no_setting_that_it_does_not_name(federate, strategy):
    assert {*OTHERS, "attempts", "recovery_rounds"} == {field.name for field in fields(Unlearn)}
    assert set(STRATEGIES[strategy].reads) <= set(OTHERS)
    tune = "unlearn.tune=fixed unlearn.rounds=2"
    usual, _ = forgotten(federate, strategy, tune)
    unread = {name: value for name, value in OTHERS.items() if name not in STRATEGIES[strategy].reads}
    words = " ".join(f"unlearn.{name}={value}" for name, value in unread.items())
    federate(f"{SETTINGS} {tune} {words} strategy={strategy} {LEAVES} run=changed")
    assert equal(usual, federate.state("changed"))
