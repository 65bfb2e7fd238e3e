"""The choice of alpha and lambda without a retrained model; the dampening itself is tested in `test_federation`."""

import math

import pytest

from fedunlearn.federation.handle import ForgetSet
from fedunlearn.federation.rounds import Rounds
from fedunlearn.nn.evaluate import Counts, Predictions
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning.dampening import largest_alpha
from local_grid import LocalGrid, kinds
from naive import assert_same, before, forgotten
from strategies.ssd import BISECTED, SelectiveDampening, nearest

TRIALS = 1 + sum(BISECTED.values())


def test_the_strength_of_dampening_is_chosen_without_a_retrained_model(federate):
    grid = LocalGrid(4)
    _, detail = forgotten(federate, "ssd", "unlearn.tune=auto unlearn.exponent=2", grid=grid)
    trials, predicted = detail["trials"], detail["predicted"]
    assert len(trials) == TRIALS == 8
    limit = largest_alpha(120, 28)  # examples of all, and of client 3
    assert trials[0]["alpha"] == limit
    firsts = {trial["lambda_"]: trial["alpha"] for trial in reversed(trials[1:])}
    assert firsts == pytest.approx({lambda_: math.sqrt(lambda_ * limit) for lambda_ in BISECTED})
    chosen = nearest([trial for trial in trials if trial["test"] >= trials[0]["test"] - 0.05], predicted)
    assert (detail["alpha"], detail["lambda_"]) == (chosen["alpha"], chosen["lambda_"])
    asked = [task for task, _ in kinds(grid, client=3)[kinds(grid, client=3).index(("fisher", 2)) :]]
    assert asked == ["fisher", "class_counts", *["evaluate"] * TRIALS]
    after = detail["after"]
    assert after["forgotten"]["3"]["class"] == pytest.approx(chosen["forgotten"])
    assert after["test"]["class"] == pytest.approx(chosen["test"])


def test_dampening_nothing_is_tried_too(federate):
    pooled, run = before(federate), federate.run("before")
    federation = Rounds.assemble(run).federation
    federation.grid = LocalGrid(2)
    federation.nodes.identify(federation.grid, {})
    run.ledger.advance(run.ledger.file([3])[0], State.COLLECTING)
    strategy = SelectiveDampening(SelectiveDampening.Settings())
    with federation.applying(ForgetSet((3,))):
        full, forget = strategy.fishers(federation, ForgetSet((3,)))
        known = pooled.evaluate(3).class_accuracy
        assert strategy.search(federation, ForgetSet((3,)), full, forget, known)[0]["forgotten"] == known
    assert_same(federation.state.params, pooled.state())


def test_of_trials_near_the_target_the_best_on_held_out_images_is_chosen():
    trials = [{"forgotten": f, "test": t} for f, t in ((0.50, 0.1), (0.515, 0.3), (0.49, 0.2), (0.6, 0.9))]
    assert nearest(trials, 0.5)["test"] == 0.3
    assert nearest(trials, 0.7)["test"] == 0.9


def test_a_strength_that_destroys_the_model_is_not_chosen_however_near_it_comes(federate, monkeypatch):
    """Of a memorised client the only near one may be at chance."""
    tried = [(0.99, 0.50), (0.97, 0.50), (0.72, 0.46), (0.07, 0.10)]
    trials = [{"alpha": 9.0 - n, "lambda_": 1.0, "forgotten": f, "test": t} for n, (f, t) in enumerate(tried)]
    monkeypatch.setattr(SelectiveDampening, "search", lambda *given: trials)
    monkeypatch.setattr(Predictions, "total", property(lambda self: Counts(100, 1.0, 50)))  # estimated of test images
    _, detail = forgotten(federate, "ssd", "unlearn.tune=auto")
    assert detail["alpha"] == 7.0
