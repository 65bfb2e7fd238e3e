"""Averages that a few dishonest updates cannot turn, beside plain loops over values, and in a federation."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fedunlearn.federation import messages, robust
from fedunlearn.federation.replies import Results
from local_grid import LocalGrid, equal

FOUR = "rounds=2 forget.schedule={} train.precision=fp32 message_dtype=fp32"


def replies(*values, weights=None):
    weights = weights or [1.0] * len(values)
    return [Results({"w": w * torch.tensor(v)}, w) for v, w in zip(values, weights, strict=True)]


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=3, max_size=9))
def test_the_median_and_the_trimmed_mean_are_those_of_each_value(vectors):
    found = robust.mean(replies(*vectors, weights=[float(1 + n) for n in range(len(vectors))]), "median")["w"]
    expected = [statistics.median(column) for column in zip(*vectors, strict=True)]
    assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    each = len(vectors) // 4
    trimmed = [statistics.mean(sorted(column)[each : len(column) - each]) for column in zip(*vectors, strict=True)]
    assert_close(robust.mean(replies(*vectors), "trimmed_mean")["w"], torch.tensor(trimmed), rtol=1e-4, atol=1e-4)


def test_by_hand_clipping_moves_what_is_too_far_to_the_usual_distance():
    """Medians 2 and 0: distances 1, 0, 1, 2 and 10, of which the median is 1; the last two are moved there."""
    vectors = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [2.0, 2.0], [2.0, -10.0]]
    found = robust.mean(replies(*vectors, weights=[1.0, 1.0, 1.0, 2.0, 1.0]), "clip")["w"]
    assert_close(found, torch.tensor([2.0, (2 * 1 - 1) / 6]))


@pytest.mark.parametrize("rule", ["clip", "median", "trimmed_mean"])
def test_equal_updates_give_themselves_and_one_of_five_moves_the_mean_little(rule):
    assert_close(robust.mean(replies(*[[1.0, -2.0]] * 4), rule)["w"], torch.tensor([1.0, -2.0]))
    honest = [[1.0 + 0.1 * n, 2.0] for n in range(4)]
    for lie in ([1e6, -1e6], [-10.0, 0.0]):
        found = robust.mean(replies(*honest, lie), rule)["w"]
        assert (found - torch.tensor([1.15, 2.0])).norm() < 0.3


def test_running_statistics_do_not_say_who_is_far_away():
    parts = [
        Results({"w": torch.tensor([float(n)]), "bn.running_var": torch.tensor([100.0 * n])}, 1.0) for n in range(5)
    ]
    found = robust.mean(parts, "clip")
    assert_close(found["w"], torch.tensor([2.0]))


@pytest.mark.parametrize("rule", ["clip", "median"])
def test_results_do_not_depend_on_how_many_nodes_there_are(federate, rule):
    federate(f"{FOUR} robust={rule} run=two", nodes=2)
    federate(f"{FOUR} robust={rule} run=four", nodes=4)
    assert equal(federate.state("two"), federate.state("four"))


def test_of_two_updates_the_mean_is_the_usual_one(federate):
    federate(f"{FOUR} fraction=0.5 run=plain", nodes=4)
    federate(f"{FOUR} fraction=0.5 robust=median run=robust", nodes=4)
    assert equal(federate.state("plain"), federate.state("robust"))


@pytest.mark.parametrize(
    "rule", ["median", *(pytest.param(r, marks=pytest.mark.thorough) for r in ("clip", "trimmed_mean"))]
)
def test_one_liar_of_four_turns_the_model_less(federate, rule):
    """The liar's updates are ten times as long."""

    def distance(words, lies):
        grid = LocalGrid(4)

        def deliver(message):
            reply, task = grid.call(message), messages.task_of(message)
            if lies and task.name == "train" and task.clients == [1]:
                values = {n: 10 * v for n, v in messages.unpack(reply).items() if not n.endswith(messages.STATISTICS)}
                reply.content["arrays"] = messages.pack({**messages.unpack(reply), **values}, "fp32")
            return reply

        grid.deliver = deliver
        name = f"run-{words.replace('=', '-').replace(' ', '-')}-{lies}"
        federate(f"{FOUR} {words} run={name}", grid=grid)
        return federate.state(name)

    def moved(words):
        honest, turned = distance(words, False), distance(words, True)
        weights = [n for n in honest if n.endswith("weight")]
        return sum(float((honest[n] - turned[n]).norm() ** 2) for n in weights) ** 0.5

    assert moved(f"robust={rule}") < 0.5 * moved("robust=none")
