import math

import pytest

from fedunlearn.study.pooled.search import best, read_trials, search

RANGES = {"alpha": (0.1, 100.0), "lambda_": (0.01, 10.0)}


class StopError(Exception):
    pass


def objective(alpha, lambda_):
    return abs(math.log10(alpha) - 1) + abs(math.log10(lambda_) + 1), {"product": alpha * lambda_}


def run(file, trials=30, seed=0, stop=None):
    def tick(done):
        if done == stop:
            raise StopError

    return search(RANGES, objective, trials=trials, file=file, seed=seed, tick=tick)


def test_comes_near_the_minimum_within_the_ranges(tmp_path):
    trials = run(tmp_path / "trials", 60)
    assert len(trials) == 60
    assert all(0.1 <= t["alpha"] <= 100 and 0.01 <= t["lambda_"] <= 10 for t in trials)
    chosen = best(trials)
    assert chosen["value"] < 0.3
    assert chosen["product"] == chosen["alpha"] * chosen["lambda_"]
    assert chosen["value"] < best(trials[:10])["value"]


def test_an_interrupted_search_ends_the_same(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(StopError):
        run(tmp_path / "parts", stop=17)
    assert len(read_trials(tmp_path / "parts")) == 17
    with open(tmp_path / "parts", "a") as file:
        file.write('{"alpha": 1.0, "lam')  # cut short in the midst of a line
    assert run(tmp_path / "parts") == whole == read_trials(tmp_path / "parts")
    assert run(tmp_path / "other", seed=1) != whole


def test_of_equal_values_the_gentlest_is_best():
    rows = [{"value": v, "alpha": a, "lambda_": b} for v, a, b in ((1, 2, 1), (1, 9, 1), (1, 9, 3), (2, 99, 9))]
    assert best(rows) == {"value": 1, "alpha": 9, "lambda_": 3}
    rows = [{"value": 1, "exponent": e, "lambda_": 1} for e in (3, 0.5, 7)]
    assert best(rows)["exponent"] == 0.5
