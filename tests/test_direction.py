"""An update whose opposite serves its own client better is refused; honest ones never are, however uneven the split."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.federation import messages
from fedunlearn.federation.direction import check_direction, lost_by
from fedunlearn.federation.replies import RefusedError
from local_grid import LocalGrid

WORDS = "rounds=3 train.schedule_rounds=12 data.limit=300 train.precision=fp32 message_dtype=fp32 forget.schedule={}"


def by_hand(probs, of_opposite, labels, counts):
    """The same in plain loops: images of class k share the weight of the client's images of class k."""
    weights = [counts[label] / labels.count(label) for label in labels]
    weights = [weight / sum(weights) for weight in weights]
    differences = [b - a for a, b in zip(probs, of_opposite, strict=True)]
    mean = sum(w * d for w, d in zip(weights, differences, strict=True))
    return mean, math.sqrt(sum((w * (d - mean)) ** 2 for w, d in zip(weights, differences, strict=True)))


@settings(deadline=None)
@given(st.data())
def test_what_is_lost_is_a_mean_over_the_clients_classes(data):
    labels = [0, 1, 2, *data.draw(st.lists(st.integers(0, 2), max_size=6))]
    values = st.lists(st.floats(0, 1), min_size=len(labels), max_size=len(labels))
    probs, of_opposite = data.draw(values), data.draw(values)
    counts = [*data.draw(st.lists(st.integers(0, 50), min_size=2, max_size=2)), 1]
    tensors = [torch.tensor(values, dtype=torch.float64) for values in (probs, of_opposite)]
    found = lost_by(*tensors, torch.tensor(labels), torch.tensor(counts))
    mean, error = by_hand(probs, of_opposite, labels, counts)
    assert found.value == pytest.approx(mean, abs=1e-9)
    assert found.error == pytest.approx(error, abs=1e-7)


def test_what_other_classes_lose_does_not_matter():
    labels, counts = torch.tensor([0] * 8 + [1] * 8), torch.tensor([20, 0])
    better, worse = torch.tensor([0.9] * 8 + [0.0] * 8), torch.tensor([0.1] * 8 + [1.0] * 8)
    check_direction(better, worse, labels, counts)
    with pytest.raises(RefusedError, match="points the wrong way"):
        check_direction(worse, better, labels, counts)


@pytest.mark.parametrize(
    ("probs", "of_opposite"),
    [
        ([1.0, 0.0, 0.1], [0.0, 1.0, 1.0]),  # by chance
        ([0.5] * 9, [0.51] * 9),  # hardly
    ],
)
def test_what_may_be_chance_or_hardly_matters_is_let_through(probs, of_opposite):
    about = (
        torch.tensor(probs),
        torch.tensor(of_opposite),
        torch.zeros(len(probs), dtype=torch.long),
        torch.tensor([20]),
    )
    assert lost_by(*about).value > 0
    check_direction(*about)


def test_a_client_whose_classes_the_server_has_no_images_of_is_let_through():
    about = torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0]), torch.tensor([0, 5])
    assert math.isnan(lost_by(*about).value)
    check_direction(*about)


def named(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]


def turned(task_name, client, factor):
    """A grid on which one client turns its updates round."""
    grid = LocalGrid(4)

    def deliver(message):
        reply, task = grid.call(message), messages.task_of(message)
        if task.name == task_name and task.clients == [client]:
            values = messages.unpack(reply)
            lie = {n: v if n.endswith(messages.STATISTICS) else factor * v for n, v in values.items()}
            reply.content["arrays"] = messages.pack(lie, "fp32")
        return reply

    grid.deliver = deliver
    return grid


@pytest.mark.parametrize("factor", [-1.0, -3.0])
def test_a_client_that_turns_its_updates_round_is_named_and_nobody_else(federate, capsys, factor):
    federate(f"{WORDS} robust=median", grid=turned("train", 1, factor))
    lines = named(capsys)
    assert len(lines) >= 2  # the first update of an untrained model is small
    assert all("node 1 (clients 1) is left out: its update points the wrong way" in line for line in lines)
    rounds = [row["clients"] for row in federate.run().metrics() if row["kind"] == "round"]
    assert rounds.count([0, 2, 3]) == len(lines)


@pytest.mark.parametrize("alpha", [0.05, 0.6, 100])
def test_no_honest_client_is_named_however_uneven_the_split(federate, capsys, alpha):
    federate(f"{WORDS} robust=clip partition.dirichlet_alpha={alpha}", nodes=4)
    assert named(capsys) == []


def test_a_client_that_says_nothing_of_its_classes_does_not_train(federate, capsys):
    grid = LocalGrid(4)
    grid.deliver = lambda message: (
        None if messages.task_of(message).name == "class_counts" and 1 in messages.task_of(message).clients
        else grid.call(message)
    )  # fmt: skip
    federate(f"{WORDS} robust=median timeout=1", grid=grid)
    reasons = [line for line in named(capsys) if "it did not say how many images of each class it has" in line]
    assert len(reasons) == 3
    assert federate.run().metrics()[1]["clients"] == [0, 2, 3]


def test_without_robust_nobody_is_asked_for_classes(federate):
    asked = []
    grid = LocalGrid(2)
    grid.deliver = lambda message: (asked.append(messages.task_of(message).name), grid.call(message))[1]
    federate(WORDS, grid=grid)
    assert "class_counts" not in asked


def test_in_a_request_retain_clients_are_looked_at_and_the_leaving_one_is_not(federate, capsys, memorised):
    """The leaving client climbs its loss: its update points the wrong way on purpose."""
    words = "rounds=2 robust=median strategy=ascent forget.schedule={2:[3]} forget.budget=1"
    federate(f"{words} train.precision=fp32 message_dtype=fp32", nodes=4)
    assert named(capsys) == []
    assert federate.requests()[0].state != "QUARANTINED"
