"""Relabelling by a few gradients, on four clients of handwritten digits."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import reference
from fedunlearn.federation.handle import SERVER
from fedunlearn.nn.evaluate import Counts
from fedunlearn.nn.rng import generator_of
from fedunlearn.unlearning.fisher import with_drawn_labels
from fedunlearn.unlearning.soft_labels import assign_soft_labels
from local_grid import LocalGrid, asked
from naive import SETTINGS, before, estimated, forgotten, pruned
from strategies.gradients import GradientRelabelling
from strategies.relabel import Goal
from test_relabel import telling, views_of

pytestmark = pytest.mark.usefixtures("memorised")
QUICK = "unlearn.repair_lr=0 train.lr=0 unlearn.freeze_fraction=0 unlearn.most_rounds=1"


def soft_gradient(pooled, client, estimate):
    """The mean gradient towards the client's soft labels, of the whole loss at once."""
    views, labels = views_of(pooled, client), pooled.client(client).labels
    draws = generator_of(0, client)
    soft = assign_soft_labels(views, labels, estimate.class_probs, estimate.class_labels, 1.0, generator=draws)
    images = torch.cat([images for images, _, _ in pooled.batches(client)])
    pooled.model.eval().zero_grad()
    loss = -(soft * pooled.model(images).class_logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in pooled.model.named_parameters() if p.grad is not None}


def held_out_factors(pooled, temperature):
    """Kronecker factors of all held-out images at softened predictions, with classes drawn from these."""
    generator = generator_of(0, 2, SERVER, 1)
    batches = pooled.server.sample(500, generator)
    with torch.no_grad():
        for p in pooled.model.class_head.out.parameters():
            p /= temperature
    drawn = with_drawn_labels(pooled.model, batches, generator)
    images, labels, _ = (torch.cat(part) for part in zip(*drawn, strict=True))
    found = reference.kronecker_factors(pooled.model, images, labels)
    with torch.no_grad():
        for p in pooled.model.class_head.out.parameters():
            p *= temperature
    return found


@pytest.mark.slow
def test_a_step_is_the_mean_gradient_guided_by_both_factors(federate, monkeypatch):
    pooled, layer = before(federate), "class_head.hidden"
    estimate = estimated(federate, pooled, [3])
    gradient = soft_gradient(pooled, 3, estimate)
    factors = held_out_factors(pooled, 4.0)
    by = {}
    for kind, ridge in (("inputs", 0.1), ("outputs", 0.3)):
        a = factors[f"{layer}.{kind}"]
        tau = ridge * a.diagonal().mean()
        by[kind] = tau * torch.linalg.inv(a + tau * torch.eye(len(a)))
    rows = torch.cat([gradient[f"{layer}.weight"], gradient[f"{layer}.bias"][:, None]], 1).double()
    step = -1000 * by["outputs"] @ rows @ by["inputs"]
    monkeypatch.setattr(Counts, "class_accuracy", property(lambda self: 1.0))
    settings = f"{QUICK} unlearn.steps=1 unlearn.lr=1000 unlearn.ridge=0.1"
    start = pooled.state()
    found, _ = forgotten(federate, "gradients", settings)
    moved = found[f"{layer}.weight"].double() - start[f"{layer}.weight"].double()
    assert float((moved - step[:, :-1]).norm()) < 0.02 * float(step[:, :-1].norm())
    assert_close(found["stem.1.weight"], start["stem.1.weight"])


def test_no_step_is_taken_where_the_accuracy_is_already_the_estimated_one(federate, monkeypatch):
    """Fewer images are right than estimated: the client is asked for one gradient, and the model stays."""
    pooled = before(federate)
    monkeypatch.setattr(Counts, "class_accuracy", property(lambda self: 0.0))
    grid = LocalGrid(2)
    found, detail = forgotten(federate, "gradients", f"{QUICK} unlearn.lr=1 unlearn.steps=3", grid=grid)
    wanted = pruned(pooled.state())
    for name in ("stem.0.weight", "class_head.out.weight"):
        assert_close(found[name], wanted[name], rtol=0, atol=1e-6)
    assert [task for task, client in asked(grid) if client == 3].count("gradient") == 1
    assert "predicted" in detail


@pytest.mark.parametrize("stop", [0.3, 0.81])
def test_by_hand_the_last_step_is_shortened_to_where_the_accuracy_is_the_aimed_one(federate, monkeypatch, stop):
    """A step along which the accuracy falls below the aim at that part of the way."""
    pooled, start = before(federate), {}
    place = "class_head.out.bias"

    def too_far(self, federation, goal, aim):
        way = float((federation.state.params[place] - start[place]).mean())
        return way > stop

    def guided(self, federation, gradient, guide, lr):
        return {place: torch.ones_like(federation.state.params[place])}

    start |= pooled.state()
    monkeypatch.setattr(GradientRelabelling, "too_far", too_far)
    monkeypatch.setattr(GradientRelabelling, "guided", guided)
    monkeypatch.setattr(Counts, "class_accuracy", property(lambda self: 1.0))
    found, _ = forgotten(federate, "gradients", f"{QUICK} unlearn.steps=1")
    assert float((found[place] - start[place]).mean()) == pytest.approx(stop, abs=1 / 2**4)


class OneWeight:
    """A federation whose model is one number, of which the forget client's accuracy depends."""

    def __init__(self, right):
        self.state, self.right, self.seen = 0, right, []

    def run(self, task, *, on, **arguments):
        self.seen.append(self.state)
        return SimpleNamespace(total=self.counts(on), mean=lambda: self.seen[-1] + 1)

    def counts(self, clients):
        return Counts(100, class_correct=self.right[self.state])

    def examples(self, clients):
        return 100

    def apply(self, by):
        self.state += by


@pytest.mark.parametrize(("steps", "seen", "end"), [(3, [0, 4, 2], 2), (4, [0, 4, 2, 8], 5), (1, [0], 0)])
def test_by_hand_a_step_that_goes_too_far_is_taken_anew_half_as_long(monkeypatch, steps, seen, end):
    """Steps 4 from 0 and 2 * 3 from 2 get more images right than before; where no step is left, it is taken back."""
    monkeypatch.setattr(GradientRelabelling, "guided", lambda self, federation, gradient, guide, lr: lr * gradient)
    strategy = GradientRelabelling(GradientRelabelling.Settings(steps=steps, lr=4))
    federation = OneWeight({0: 90, 4: 95, 2: 80, 8: 85, 5: 70})
    estimate = SimpleNamespace(class_probs=0, class_labels=0)
    goal = Goal(estimate, accuracy={3: 0.4}, known=[3], total=0.4, memorised=1.0)
    strategy.step_to(federation, goal, {})
    assert (federation.seen, federation.state) == (seen, end)


def test_the_forget_client_sends_gradients_and_never_trains(federate):
    grid = LocalGrid(2)
    forgotten(federate, "gradients", f"{QUICK} unlearn.steps=2 unlearn.lr=0.001", grid=grid)
    tasks = [task for task, client in asked(grid) if client == 3]
    after = tasks[tasks.index("gradient") :]
    assert set(after) <= {"gradient", "evaluate"}
    assert 1 <= after.count("gradient") <= 2


def test_further_rounds_are_of_those_alone_who_are_still_known_better(federate, monkeypatch):
    examples, grid = federate.pooled(SETTINGS).examples(3), LocalGrid(1)
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: True)
    monkeypatch.setattr("strategies.relabel.errors_above", lambda found, aim: 9.0 * (found.examples == examples))
    settings = f"{QUICK} unlearn.steps=1 unlearn.lr=0 unlearn.most_rounds=2"
    forgotten(federate, "gradients", settings, forgets="forget.schedule={2:[1,3]}", grid=grid)
    clients = [client for task, client in asked(grid) if task == "gradient"]
    assert (clients.count(1), clients.count(3)) == (1, 2)


def test_rounds_of_steps_and_repair_go_on_until_clients_are_known_no_better_than_estimated(federate, capsys):
    """The client counts after its steps and after the repair; only the last count is not far above the estimate."""
    examples = federate.pooled(SETTINGS).examples(3)
    for most, hits, rounds in ((4, [examples, examples, 0], 3), (4, [0], 1), (2, [examples] * 2, 2)):
        found = iter([examples, *(count for hit in hits for count in (examples, hit))])
        grid = telling(lambda client, found=found: Counts(examples, 1.0, next(found), 0), [3])
        settings = f"{QUICK} unlearn.steps=1 unlearn.lr=0 unlearn.most_rounds={most}"
        forgotten(federate, "gradients", settings, run=f"{most}-{len(hits)}", grid=grid)
        assert len(grid.sent_for("gradient")) == rounds
        assert ("still known better" in capsys.readouterr().err) == (hits[-1] > 0)
