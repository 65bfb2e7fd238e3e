"""Gradient ascent and projected gradient ascent beside naive versions, on four clients of handwritten digits."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedunlearn.apps.registry import STRATEGIES
from fedunlearn.build import model_of
from fedunlearn.nn.rng import generator_of
from fedunlearn.runs.run import Run
from naive import SETTINGS, assert_same, before, foretold, forgotten, pruned, trained


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
    monkeypatch.setattr("fedunlearn.federation.requests.Forgetting.foretold_accuracy", lambda self, clients: -1.0)
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
    monkeypatch.setattr("fedunlearn.federation.requests.Forgetting.foretold_accuracy", lambda self, clients: -1.0)
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
