"""Nodes that fail, answer nonsense or are silent: what is left out, what is tried again, what ends a run."""

import pytest
import torch
from flwr.app import ArrayRecord, Message
from torch.testing import assert_close

from fedunlearn.errors import UserError
from fedunlearn.federation import messages as wire
from fedunlearn.runs.ledger import State
from local_grid import LocalGrid, kinds
from test_federation import ONE_STEP


def broken(grid, damage, *, kind="train", node=1, times=1):
    """Let the first `times` messages of `kind` to node number `node` be answered by `damage(reply)`."""
    left = [times]

    def deliver(message):
        mine = grid.nodes[message.metadata.dst_node_id] == node and message.metadata.message_type == kind
        if mine and left[0]:
            left[0] -= 1
            return damage(grid.call(message), message)
        return grid.call(message)

    grid.deliver = deliver


TWO_NODES = [[0, 3], [1, 2]]  # who hosts whom, of four clients with about equally many examples each node


def change(**arrays):
    def damage(reply, message):
        tensors = wire.tensors_of(reply)
        for name, function in arrays.items():
            tensors[name.replace("__", ".")] = function(tensors.pop(name.replace("__", ".")))
        reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    return damage


def renamed(reply, message):
    tensors = wire.tensors_of(reply)
    tensors["else"] = tensors.pop("class_head.out.bias")
    reply.content["arrays"] = ArrayRecord(tensors)
    return reply


def failed(reply, message):
    from flwr.app import Error

    return Message(Error(0, "the node ran\nout of memory"), reply_to=message)


DAMAGES = {
    "error": (failed, "out of memory"),
    "silence": (lambda reply, message: None, "no reply within 0.3 s"),
    "NaN": (change(class_head__out__bias=lambda t: t * torch.nan), "NaN or infinite values in class_head.out.bias"),
    "shape": (change(class_head__out__bias=lambda t: t[:-1]), r"class_head.out.bias of shape [9], not [10]"),
    "names": (renamed, "wrong names: class_head.out.bias, else"),
}


@pytest.mark.parametrize(("times", "clients"), [(2, [0, 1, 2, 3]), (3, TWO_NODES[0])])
def test_a_node_that_does_not_say_whom_it_hosts_is_asked_three_times(federate, capsys, times, clients):
    grid = LocalGrid(2)
    broken(grid, failed, kind="query.identify", times=times)
    federate("rounds=1 forget.schedule={1:[2]} unlearn.attempts=1", grid=grid)
    assert f"attempt {times} of 3: out of memory" in capsys.readouterr().out
    assert federate.run().metrics()[0]["clients"] == clients
    expected = State.COMPLETED if times == 2 else State.QUARANTINED
    assert [request.state for request in federate.requests()] == [expected]


def test_without_any_node_that_works_the_run_ends_with_one_line(federate):
    grid = LocalGrid(1)
    broken(grid, failed, kind="query.identify", node=0, times=100)
    with pytest.raises(UserError, match="no node works"):
        federate(grid=grid)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_node_that_fails_is_named_and_left_out_of_that_round(federate, capsys, damage, reason):
    grid = LocalGrid(2)
    broken(grid, damage)
    federate("timeout=0.3", grid=grid)
    assert f"round 1: node 1 (clients 1, 2) is left out: {'it sent ' if 'of shape' in reason else ''}" in (
        out := capsys.readouterr().out
    )
    assert reason in out
    assert [row["clients"] for row in federate.run().metrics()] == [TWO_NODES[0], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_what_is_left_of_a_round_is_the_mean_of_those_who_answered(federate):
    grid = LocalGrid(4)
    broken(grid, failed, node=2)
    federate(f"{ONE_STEP} forget.schedule={{}}", grid=grid)
    worker = federate.worker(ONE_STEP)
    examples = [worker.examples(c) for c in range(4)]
    sent = [message for message in grid.sent if message.metadata.message_type == "train"]
    assert [wire.task_of(m).clients for m in sent] == [[c] for c in sorted(range(4), key=lambda c: -examples[c])]
    sums = {wire.task_of(m).clients[0]: wire.tensors_of(grid.call(m))["class_head.out.bias"] for m in sent}
    moved = (sums[0] + sums[1] + sums[3]) / (sum(examples) - examples[2])
    before = worker.model.state_dict()["class_head.out.bias"]
    assert_close(federate.state()["class_head.out.bias"], before + moved)


def test_a_round_without_any_answer_ends_the_run_with_the_way_on(federate):
    grid = LocalGrid(1)
    broken(grid, failed, node=0, times=100)
    with pytest.raises(UserError, match=r'round 1: no client answered; .*overrides="run=test"'):
        federate(grid=grid)
    federate()
    assert federate.run().ledger.head().finished


def test_a_failed_fisher_query_is_tried_again_and_then_set_aside(federate, capsys):
    grid = LocalGrid(4)
    broken(grid, failed, kind="query.fisher", node=3, times=1)
    federate("forget.schedule={1:[3]}", grid=grid)
    (request,) = federate.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 2)
    assert not [kind for kind in kinds(grid, client=3) if kind == ("train", 2)]

    grid = LocalGrid(4)
    broken(grid, failed, kind="query.fisher", node=3, times=100)
    federate("run=set_aside forget.schedule={1:[3]}", grid=grid)
    out = capsys.readouterr().out
    assert "request r1, attempt 3: client 3 did not answer query.fisher; set aside" in out
    assert not [kind for kind in kinds(grid, client=3) if kind[0] == "train" and kind[1] > 1]
