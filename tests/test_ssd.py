"""The choice of alpha and lambda without gold; the dampening step itself is tested in `test_federation`."""

import math

import pytest

from fedunlearn.apps.registry import STRATEGIES
from fedunlearn.federation.ordered_grid import OrderedGrid
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning.dampening import largest_alpha
from local_grid import LocalGrid, kinds
from naive import LEAVES, SETTINGS, assert_same, before
from strategies.ssd import BISECTED, EVALUATIONS, nearest


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


def test_of_trials_near_the_target_the_best_on_unseen_images_is_chosen():
    trials = [{"forgotten": f, "test": t} for f, t in ((0.50, 0.1), (0.515, 0.3), (0.49, 0.2), (0.6, 0.9))]
    assert nearest(trials, 0.5)["test"] == 0.3
    assert nearest(trials, 0.7)["test"] == 0.9
