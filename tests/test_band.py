"""Replies that are far larger than the others of the same query."""

import pytest
import torch

from fedunlearn.federation.band import FIRST, judged, sizes_of
from fedunlearn.federation.replies import Results
from fedunlearn.nn.evaluate import Counts

EXAMPLES = dict.fromkeys(range(40), 100)


def reply(client, size, **statistics):
    """A client's update of norm `size`, times its weight."""
    update = torch.tensor([3.0, 4.0]) / 5 * size
    return Results(
        {"w": 100 * update, "bn.running_mean": torch.ones(3) * 1e9}, 100, {client: Counts(100)}, **statistics
    )


def refused(sizes, width=5.0):
    """The places of those that are refused, of replies of such sizes."""
    replies = [(place, reply(place, size)) for place, size in enumerate(sizes)]
    found = list(judged(replies, width, EXAMPLES))
    assert [place for place, _, _ in found] == list(range(len(sizes)))  # in their order
    return [place for place, _, reason in found if reason]


@pytest.mark.parametrize("place", [0, 2, 4, 5, 9])
@pytest.mark.parametrize("size", [5.2, 1e3, 1e30])
def test_a_reply_that_is_far_too_large_is_refused_wherever_it_comes(place, size):
    sizes = [1.0, 0.9, 1.1, 0.5, 2.0, 1.0, 1.2, 0.8, 1.0, 1.0]
    sizes[place] = size
    assert refused(sizes) == [place]


def test_two_of_the_first_five_cannot_hide_each_other():
    assert refused([1e3, 1e3, 1.0, 1.1, 0.9, 1e3, 1.0]) == [0, 1, 5]


def test_of_one_or_two_nobody_can_say_which_is_the_odd_one():
    assert refused([1e6]) == []
    assert refused([1.0, 1e6]) == []
    assert refused([1.0, 1e6, 1.0]) == [1]


def test_small_ones_pass_and_a_width_of_nothing_lets_all_pass():
    assert refused([1.0, 1e-9, 1.0, 1.0]) == []
    assert refused([1.0, 1e9, 1.0, 1.0], width=0) == []
    assert refused([0.0, 0.0, 0.0, 1.0]) == []  # of nothing, everything is many times


def test_sizes_are_by_the_root_of_the_examples_and_running_statistics_do_not_count():
    assert sizes_of(reply(0, 2.0), {0: 100}) == pytest.approx({"update": 0.2})
    assert sizes_of(reply(0, 2.0), {0: 400}) == pytest.approx({"update": 0.1})
    assert sizes_of(Results({"w": torch.tensor([8.0])}, 2, {0: Counts(4), 1: Counts(4)}), {0: 4, 1: 4}) == {"update": 2}
    two = Results({}, 2, {0: Counts(4), 1: Counts(9)}, {0: torch.tensor([8.0]), 1: torch.tensor([9.0])})
    assert sizes_of(two, {0: 4, 1: 9}) == pytest.approx({"statistics": 2.0})


def test_statistics_are_compared_too():
    replies = [(place, reply(place, 1.0, statistics={place: torch.tensor([100.0])})) for place in range(3)]
    replies.append((3, reply(3, 1.0, statistics={3: torch.tensor([1e6])})))
    reasons = [reason for _, _, reason in judged(replies, 5.0, EXAMPLES)]
    assert reasons[:3] == [""] * 3
    assert reasons[3].startswith("its statistics are 1e+04 times as large as is usual")


def test_replies_are_taken_as_they_come_but_for_the_first():
    taken = []

    def coming():
        for place in range(12):
            taken.append(place)
            yield place, reply(place, 1.0)

    found = judged(coming(), 5.0, EXAMPLES)
    next(found)
    assert len(taken) == FIRST
    for count in range(2, 13):
        next(found)
        assert len(taken) == max(FIRST, count)


@pytest.mark.parametrize("place", [0, 4, 5, 9])
def test_a_large_update_is_taken_and_remembered(place):
    sizes = [1.0, 0.9, 1.1, 0.5, 1.9, 1.0, 1.2, 0.8, 1.0, 1.0]
    sizes[place] = 4.0
    total = Results()
    for _, one, reason in judged([(n, reply(n, size)) for n, size in enumerate(sizes)], 5.0, EXAMPLES):
        assert not reason
        total.include(one)
    assert total.outsized == {place}
