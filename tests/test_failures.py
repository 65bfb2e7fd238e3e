"""Nodes that fail, reply with nonsense or are silent: what is left out, what is tried again, what ends a run."""

import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from torch.testing import assert_close

from fedunlearn.errors import NotNowError, UserError
from fedunlearn.federation import messages
from fedunlearn.federation.handle import ForgetSet
from fedunlearn.federation.rounds import Rounds
from fedunlearn.runs.ledger import State
from local_grid import LocalGrid, kinds
from naive import ONCE
from test_federation import ONE_STEP


def broken(grid, damage, *, task="train", node=1, times=1):
    """Let the first `times` messages of a client task to node number `node` be answered by `damage(reply)`."""
    left = [times]

    def deliver(message):
        mine = grid.nodes[message.metadata.dst_node_id] == node and messages.task_of(message).name == task
        if mine and left[0]:
            left[0] -= 1
            return damage(grid.call(message), message)
        return grid.call(message)

    grid.deliver = deliver


def hosting_their_own(grid, clients):
    """Let each node answer for clients of its own alone, as machines with data of their own do."""

    def deliver(message):
        reply = grid.call(message)
        if messages.task_of(message).name == "identify":
            metrics, own = reply.content["metrics"], clients[grid.nodes[message.metadata.dst_node_id]]
            for column in ("client", "examples", "loss", "class_correct", "client_correct"):
                metrics[column] = [metrics[column][client] for client in own]
        return reply

    grid.deliver = deliver


TWO_NODES = [[0, 3], [1, 2]]  # who hosts whom, of four clients with about equally many examples each node


def change(record="arrays", **arrays):
    def damage(reply, message):
        tensors = messages.unpack(reply, record)
        for name, function in arrays.items():
            name = name.replace("__", ".").removeprefix("client_")
            tensors[name] = function(tensors.pop(name))
        reply.content[record] = ArrayRecord(tensors)
        return reply

    return damage


def renamed(reply, message):
    tensors = messages.unpack(reply)
    tensors["else"] = tensors.pop("class_head.out.bias")
    reply.content["arrays"] = ArrayRecord(tensors)
    return reply


def of_others(reply, message):
    reply.content["metrics"]["client"] = [0, 3]
    return reply


def failed(reply, message):
    return Message(Error(0, "the node ran\nout of memory"), reply_to=message)


DAMAGES = {
    "error": (failed, "out of memory"),
    "silence": (lambda reply, message: None, "no reply within 0.3 s"),
    "NaN": (
        change(class_head__out__bias=lambda t: t * torch.nan),
        "it sent NaN or infinite values in class_head.out.bias",
    ),
    "shape": (change(class_head__out__bias=lambda t: t[:-1]), "it sent class_head.out.bias of shape [9], not [10]"),
    "names": (renamed, "it sent wrong names: class_head.out.bias, else"),
    "clients": (of_others, "it answered for clients 0, 3"),
    "statistics": (change("statistics", client_1=lambda t: t[1:]), "it sent statistics of client 1 of shape [9, "),
    "NaN statistics": (
        change("statistics", client_2=lambda t: t * torch.nan),
        "it sent NaN or infinite values in statistics of client 2",
    ),
}


@pytest.mark.parametrize("times", [2, 3])
def test_a_node_that_says_nothing_three_times_is_left_out_and_others_take_its_clients(federate, capsys, times):
    grid = LocalGrid(2)
    broken(grid, failed, task="identify", times=times)
    federate("rounds=1 forget.schedule={1:[2]}", grid=grid)
    assert f"attempt {times} of 3: out of memory" in capsys.readouterr().err
    assert federate.run().metrics()[0]["clients"] == [0, 1, 2, 3]
    assert len(grid.sent_for("train")) == (2 if times == 2 else 1)
    assert [request.state for request in federate.requests()] == [State.COMPLETED]


def test_without_the_node_of_its_client_a_request_is_set_aside(federate):
    grid = LocalGrid(2)
    hosting_their_own(grid, [[0, 3], [1, 2]])
    with_their_own = grid.deliver
    dead = [1007]
    grid.deliver = lambda m: failed(None, m) if m.metadata.dst_node_id in dead else with_their_own(m)
    with pytest.raises(UserError, match="r1 is QUARANTINED; all else"):
        federate("rounds=1 forget.schedule={1:[2]} forget.attempts=1", grid=grid)
    assert federate.run().metrics()[0]["clients"] == [0, 3]
    assert federate.requests()[0].detail["reason"] == "client 2 did not reply to fisher"


def test_without_any_node_that_works_the_run_ends_with_one_line(federate):
    grid = LocalGrid(1)
    broken(grid, failed, task="identify", node=0, times=100)
    with pytest.raises(UserError, match="no node works"):
        federate(grid=grid)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_node_that_fails_is_named_and_left_out_of_that_round(federate, capsys, damage, reason):
    grid = LocalGrid(2)
    broken(grid, damage)
    federate("rounds=2 timeout=0.3 evaluate_every=2", grid=grid)
    assert f"round 1: node 1 (clients 1, 2) is left out: {reason}" in capsys.readouterr().err
    assert [row["clients"] for row in federate.run().metrics()] == [TWO_NODES[0], [0, 1, 2, 3]]


def test_what_is_left_of_a_round_is_the_mean_of_those_who_replied(federate):
    grid = LocalGrid(4)
    broken(grid, failed, node=2)
    federate(ONE_STEP, grid=grid)
    pooled = federate.pooled(ONE_STEP)
    examples = [pooled.examples(c) for c in range(4)]
    sent = grid.sent_for("train")
    assert [messages.task_of(m).clients for m in sent] == [[c] for c in sorted(range(4), key=lambda c: -examples[c])]
    sums = {messages.task_of(m).clients[0]: messages.unpack(grid.call(m))["class_head.out.bias"] for m in sent}
    update = (sums[0] + sums[1] + sums[3]) / (sum(examples) - examples[2])
    before = pooled.state()["class_head.out.bias"]
    assert_close(federate.state()["class_head.out.bias"], before + update)


def test_a_round_without_any_reply_ends_the_run_with_the_way_on(federate):
    grid = LocalGrid(1)
    broken(grid, failed, node=0, times=100)
    with pytest.raises(UserError, match=r"round 1: no client answered; continue from round 0 with run=test"):
        federate("rounds=1", grid=grid)
    federate("rounds=1")
    assert federate.run().ledger.current().finished


def test_a_failed_fisher_query_is_tried_again_and_then_set_aside(federate, capsys):
    grid = LocalGrid(4)
    broken(grid, failed, task="fisher", node=3, times=1)
    federate("rounds=2 forget.schedule={1:[3]}", grid=grid)
    (request,) = federate.requests()
    assert (request.state, request.detail["round"]) == (State.COMPLETED, 2)
    assert not [kind for kind in kinds(grid, client=3) if kind == ("train", 2)]

    grid = LocalGrid(4)
    broken(grid, failed, task="fisher", node=3, times=100)
    with pytest.raises(UserError, match="request r1 is QUARANTINED; all else of the run is done"):
        federate("run=set_aside rounds=2 evaluate_every=2 forget.schedule={1:[3]}", grid=grid)
    (request,) = federate.requests("set_aside")
    assert (request.state, request.detail["attempts"]) == (State.QUARANTINED, 3)
    assert "request r1, attempt 3: client 3 did not reply to fisher; set aside" in capsys.readouterr().err
    assert not [kind for kind in kinds(grid, client=3) if kind[0] == "train" and kind[1] > 1]


def of_other_images(factor):
    def damage(reply, message):
        sums = messages.unpack(reply)
        reply.content["arrays"] = ArrayRecord(
            {n: torch.stack([v[0], factor * v[1], factor**2 * v[2]]) for n, v in sums.items()}
        )
        return reply

    return damage


def test_batch_norm_statistics_of_other_images_are_left_out(federate, capsys):
    grid = LocalGrid(4)
    broken(grid, of_other_images(4), task="batch_norm_statistics", times=1)
    federate("rounds=1", grid=grid)
    said = capsys.readouterr().err
    assert "round 1: node 1 (clients 1) is left out: its BatchNorm statistics are unlike those of held-out" in said
    assert "(statistics_band); only the BatchNorm statistics are made without it" in said


def test_a_lie_about_batch_norm_statistics_before_a_request_hides_no_loss(federate):
    words = "rounds=8 train.epochs=3 data.limit=200 data.test_limit=100 evaluate_every=8"
    federate.shared(f"{words} strategy=leave")
    grid, asked = LocalGrid(4), []

    def opposite(reply):
        sums = messages.unpack(reply)
        reply.content["arrays"] = ArrayRecord({n: torch.stack([v[0], -v[1], v[2]]) for n, v in sums.items()})
        return reply

    def deliver(message):
        task, reply = messages.task_of(message), grid.call(message)
        if task.name != "batch_norm_statistics":
            return reply
        asked.append(task.round)
        return opposite(reply) if len(asked) <= 3 else reply

    grid.deliver = deliver
    destroys = "strategy=ssd unlearn.tune=fixed unlearn.alpha=0.3 forget.gate=true statistics_band=0"
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        federate(f"{words} fork=before forget.schedule={{8:[3]}} {destroys}", grid=grid)
    gate = federate.requests()[0].detail["gate"]
    assert gate["test"][0] == federate.run("before").metrics()[-1]["test"]["class"]


@pytest.mark.parametrize("strategy", ["leave", "retrain", "subset"])
def test_where_most_clients_images_are_unlike_the_servers_averages_do(federate, capsys, strategy):
    grid = LocalGrid(4)

    def deliver(message):
        reply = grid.call(message)
        is_asked = messages.task_of(message).name == "batch_norm_statistics"
        return of_other_images(4)(reply, message) if is_asked else reply

    grid.deliver = deliver
    federate(f"rounds=1 strategy={strategy} forget.schedule={{1:[3]}}", grid=grid)
    assert [request.state for request in federate.requests()] == [State.COMPLETED]
    said = capsys.readouterr().err
    assert "request r1: no BatchNorm statistics, averages in their place: the model has gone astray: 3 of 3" in said
    assert "round 1: no BatchNorm statistics, averages in their place: the model has gone astray: 4 of 4" in said
    assert "is left out" not in said


def test_one_retain_client_that_says_that_nothing_is_right_stops_no_request(federate):
    def nothing_right(reply, message):
        reply.content["metrics"]["class_correct"] = [0]
        return reply

    grid = LocalGrid(4)
    broken(grid, nothing_right, task="evaluate", node=1, times=100)
    federate("rounds=2 strategy=leave forget.gate=true forget.schedule={2:[3]} forget.budget=0.3", grid=grid)
    assert [request.state for request in federate.requests()] == [State.COMPLETED]


def test_two_nodes_that_contradict_each_other_both_go_on(federate, capsys):
    def one_more(reply, message):
        reply.content["metrics"]["examples"] = [n + 1 for n in reply.content["metrics"]["examples"]]
        return reply

    grid = LocalGrid(2)
    broken(grid, one_more, task="identify", times=1)
    federate("rounds=1", grid=grid)
    assert "nodes contradict each other about clients 0, 1, 2, 3: who hosts one is believed" in capsys.readouterr().err
    assert set(federate.run().metrics()[0]["clients"]) <= {0, 1, 2, 3}
    assert federate.run().ledger.examples() == {}


def dead_from(grid, task, node=1):
    """Let a node say nothing from the first message on that asks for a client task, whoever gets that."""
    dead = []

    def deliver(message):
        is_its = grid.nodes[message.metadata.dst_node_id] == node
        if messages.task_of(message).name == task:
            dead.append(task)
        return None if dead and is_its else grid.call(message)

    grid.deliver = deliver


def test_one_dead_retain_client_stops_no_request(federate):
    grid = LocalGrid(4)
    dead_from(grid, "class_counts")
    words = f"rounds=1 strategy=relabel unlearn.rounds=1 unlearn.epochs=1 {ONCE} timeout=0.1"
    federate(f"{words} forget.schedule={{1:[3]}} forget.gate=true forget.budget=1", grid=grid)
    (request,) = federate.requests()
    assert (request.state, request.detail.get("attempts", 0)) == (State.COMPLETED, 0)


def test_a_client_that_does_not_say_its_class_counts_is_asked_once_in_a_request(federate):
    federate.shared("rounds=1 strategy=leave", name="before")
    run = federate.run("before")
    run.ledger.advance(run.ledger.file([3])[0], State.COLLECTING)
    federation = Rounds.assemble(run).federation
    grid = federation.grid = LocalGrid(4)
    federation.nodes.identify(grid, {})
    grid.deliver = lambda m: failed(None, m) if grid.nodes[m.metadata.dst_node_id] == 1 else grid.call(m)
    for asked in (1, 2):
        with federation.applying(ForgetSet((3,))):
            for _ in range(2):
                assert federation.class_counts([0, 1, 2, 3]).keys() == {0, 2, 3}
                assert federation.class_counts([1]) == {}
                federation.know_classes([1, 2])
        assert len(grid.sent_for("class_counts")) == 4 * asked
    grid.deliver = lambda m: grid.call(m) if grid.nodes[m.metadata.dst_node_id] == 3 else failed(None, m)
    with federation.applying(ForgetSet((3,))), pytest.raises(NotNowError, match="no retain client replied"):
        federation.estimate_retrained(federation.predictions())
