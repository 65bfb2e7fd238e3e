import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.federation.ordered_grid import OrderedGrid
from local_grid import LocalGrid

echo = ClientApp()


@echo.query()
def answer(message, context):
    return Message(message.content, reply_to=message)


def messages(grid, count):
    nodes = grid.get_node_ids()
    return [Message(RecordDict({"n": ConfigRecord({"n": i})}), nodes[i % len(nodes)], "query") for i in range(count)]


def numbers(replies):
    return [None if reply.has_error() else reply.content["n"]["n"] for reply in replies]


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("newest_first", [False, True])
def test_one_reply_a_message_in_order_and_few_in_flight(window, newest_first):
    grid = LocalGrid(4, echo)
    grid.newest_first = newest_first
    ordered = OrderedGrid(grid, window=window, pause=0)
    assert numbers(ordered.send_and_receive(messages(grid, 10), timeout=1)) == list(range(10))
    assert grid.most_in_flight <= window


def test_messages_are_made_and_sent_lazily():
    grid = LocalGrid(2, echo)
    made = []
    lazy = (made.append(m) or m for m in messages(grid, 10))
    replies = OrderedGrid(grid, window=2, pause=0).send_and_receive(lazy)
    assert made == []
    next(iter(replies))
    assert len(made) == 2


def test_silence_is_answered_by_errors_and_the_others_go_on():
    grid = LocalGrid(3, echo)
    grid.deliver = lambda m: None if m.content["n"]["n"] in (1, 5) else grid.call(m)
    replies = list(OrderedGrid(grid, window=2).send_and_receive(messages(grid, 7), timeout=0.2))
    assert numbers(replies) == [0, None, 2, 3, 4, None, 6]
    assert replies[1].error.reason == "no reply within 0.2 s"


def silent(grid, numbers):
    grid.deliver = lambda m: None if m.content["n"]["n"] in numbers else grid.call(m)
    return OrderedGrid(grid, window=3, pause=0.001)


def test_who_was_silent_once_is_not_waited_for_again():
    grid = LocalGrid(3, echo)
    ordered = silent(grid, {1})
    first = list(ordered.send_and_receive(messages(grid, 3), timeout=0.2))
    assert first[1].error.reason == "no reply within 0.2 s"
    again = list(ordered.send_and_receive(messages(grid, 3), timeout=10_000))
    assert numbers(again) == [0, None, 2]
    assert float(again[1].error.reason.split()[3]) < 100


def test_who_answers_again_is_waited_for_again():
    grid = LocalGrid(3, echo)
    ordered = silent(grid, {1})
    list(ordered.send_and_receive(messages(grid, 3), timeout=0.2))
    grid.deliver = grid.call
    assert numbers(ordered.send_and_receive(messages(grid, 3), timeout=0.2)) == [0, 1, 2]
    silent(grid, {1})
    assert list(ordered.send_and_receive(messages(grid, 3), timeout=0.2))[1].error.reason == "no reply within 0.2 s"


def test_a_node_that_is_not_connected_is_an_error():
    grid = LocalGrid(1, echo)
    grid.push_messages = lambda messages: []
    (reply,) = OrderedGrid(grid, window=2).send_and_receive(messages(grid, 1))
    assert reply.error.reason == "the node is not connected"


def test_nothing_sent_nothing_received():
    assert list(OrderedGrid(LocalGrid(1, echo), window=2).send_and_receive([])) == []
