"""Gradient ascent and projected gradient ascent beside naive versions, on four clients of handwritten digits."""

import pytest
import torch

import reference
from fedunlearn.federation.handle import Federation
from fedunlearn.federation.rounds import Rounds
from fedunlearn.unlearning.ascent import ascend
from naive import assert_same, before, estimated, forgotten, pruned, trained
from strategies import pga

ONE_EPOCH = "unlearn.repair_rounds=0 unlearn.epochs=1 unlearn.lr=0.05 unlearn.clip=1"


@pytest.fixture
def unbounded(monkeypatch):
    """No accuracy is low enough for an ascent to end early."""
    monkeypatch.setattr(Federation, "estimated_accuracy", lambda self, forget: dict.fromkeys(forget, -1.0))


def climbed(pooled, state, *, radius=torch.inf):
    """Client 3's model after one epoch of ascent."""
    pooled.model.load_state_dict(state)
    client = pooled.client(3, 2)
    reference.ascend(pooled.model, client.batches(client.generator(0)), lr=0.05, clip=1, radius=radius)
    return pooled.state()


def reference_model(pooled, state):
    """The mean of the retain clients' models, as far as it follows from that of all and client 3's own."""
    own, n, rest = trained(pooled, 3, state, 2), pooled.examples(3), pooled.examples(0, 1, 2)
    return {
        name: ((n + rest) * value - n * own[name]) / rest if value.is_floating_point() else value
        for name, value in state.items()
    }


def test_ascent_climbs_the_forget_clients_loss(federate, unbounded):
    pooled = before(federate)
    state, losses = pooled.state(), [pooled.evaluate(3).mean_loss]
    found, _ = forgotten(federate, "ascent", ONE_EPOCH)
    expected = climbed(pooled, state)
    losses.append(pooled.evaluate(3).mean_loss)
    assert_same(found, pruned(expected))
    assert losses[1] > losses[0]


def test_an_ascent_ends_when_the_accuracy_is_that_of_held_out_images(federate):
    pooled = before(federate)
    predicted = estimated(federate, pooled, [3]).expected_accuracy(pooled.class_counts([3]))
    _, detail = forgotten(federate, "ascent", "unlearn.repair_rounds=0 unlearn.epochs=1000 unlearn.lr=0.01")
    assert detail["until"] == {"3": pytest.approx(predicted)}
    assert detail["after"]["forgotten"]["3"]["class"] < 1


def test_each_client_climbs_to_its_own_accuracy(federate, monkeypatch):
    """Client 1 stops at the first look at its images, and client 3 never."""
    monkeypatch.setattr(Federation, "estimated_accuracy", lambda self, forget: {1: 1.0, 3: -1.0})
    pooled, steps = before(federate), {}

    def recorded(*given, examples, **named):
        counts = ascend(*given, examples=examples, **named)
        steps[examples] = counts.examples / examples
        return counts

    monkeypatch.setattr("strategies.ascent.ascend", recorded)
    forgotten(federate, "ascent", "unlearn.repair_rounds=0 unlearn.epochs=3", forgets="forget.schedule={2:[1,3]}")
    assert steps[pooled.examples(1)] <= 0.5
    assert steps[pooled.examples(3)] == 3


def test_after_the_ascent_the_retain_clients_repair(federate):
    settings = "unlearn.repair_rounds=2 unlearn.epochs=1 unlearn.repair_lr=0.03"
    _, detail = forgotten(federate, "ascent", settings)
    assert detail["costs"]["train"]["queries"] == 2


def test_projected_ascent_stays_in_its_ball_around_the_others_mean(federate, unbounded, monkeypatch):
    monkeypatch.setattr(pga, "distance_of_random_models", lambda federation: 0.06)
    pooled = before(federate)
    state = pooled.state()
    found, detail = forgotten(federate, "pga", ONE_EPOCH)
    assert detail["radius"] == pytest.approx(0.02)
    expected = climbed(pooled, reference_model(pooled, state), radius=0.02)
    assert_same(found, pruned(expected))


def test_the_balls_radius_is_of_the_others_mean(federate, monkeypatch):
    measured = []
    monkeypatch.setattr(
        pga, "distance_of_random_models", lambda federation: measured.append(federation.state.params) or 0.06
    )
    pooled = before(federate)
    state = pooled.state()
    forgotten(federate, "pga", ONE_EPOCH)
    assert_same(measured[0], reference_model(pooled, state))


def test_the_ball_is_a_third_of_the_way_to_random_models(federate):
    pooled = before(federate)
    federation = Rounds.assemble(federate.run("before")).federation
    own = torch.cat([p.detach().flatten() for p in pooled.model.parameters()])
    distances = [
        torch.cat([p.detach().flatten() for p in pooled.server.new_model(1, i).parameters()]).sub(own).norm()
        for i in range(10)
    ]
    expected = float(torch.stack(distances).mean())
    assert pga.distance_of_random_models(federation) == pytest.approx(expected, rel=1e-4)
    _, detail = forgotten(federate, "pga", "unlearn.repair_rounds=0 unlearn.epochs=1")
    assert detail["radius"] == pytest.approx(expected / 3, rel=0.05)  # of the others' mean, which is near
