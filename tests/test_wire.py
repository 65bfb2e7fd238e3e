import torch
from flwr.app import ArrayRecord, Message
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.federation import messages as wire
from fedunlearn.nn.evaluate import Counts


def message(content):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(content, 7, "train")


def test_what_is_sent_arrives():
    state = {"b": torch.randn(2, 3), "a": torch.tensor([True, False]), "n": torch.tensor(5)}
    sent = message(wire.request(wire.Task('{"x": 1}', 3, [0, 4]), ArrayRecord(state)))
    assert wire.task_of(sent) == wire.Task('{"x": 1}', 3, [0, 4])
    arrived = wire.tensors_of(sent)
    assert list(arrived) == list(state)
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in arrived.items())
    counts = {4: Counts(10, 2.5, 7, 3), 0: Counts(1)}
    reply = wire.reply(sent, ArrayRecord({"b": state["b"]}), counts)
    assert wire.counts_of(reply) == counts
    assert wire.tensors_of(reply).keys() == {"b"}


def test_further_tensors_go_along():
    beside = {"teacher": ArrayRecord({"t": torch.ones(2)}), "projectors": ArrayRecord({"p": torch.eye(2)})}
    sent = message(wire.request(wire.Task("{}", 0, []), ArrayRecord({"a": torch.zeros(1)}), beside))
    found = {name: wire.tensors_of(sent, name) for name in ("arrays", "teacher", "projectors")}
    assert [list(tensors) for tensors in found.values()] == [["a"], ["t"], ["p"]]
    assert torch.equal(found["projectors"]["p"], torch.eye(2))


def test_in_bf16_what_is_fp32_travels_in_half_the_bytes_and_all_else_as_it_is():
    state = {"w": torch.randn(1000), "moments": torch.randn(3, dtype=torch.float64), "pruned": torch.tensor([True])}
    wide, narrow = (message(wire.request(wire.Task("{}", 0, []), wire.packed(state, p))) for p in ("fp32", "bf16"))
    arrived = wire.tensors_of(narrow)
    assert torch.equal(arrived["w"], state["w"].bfloat16().float())
    assert torch.equal(arrived["moments"], state["moments"])
    assert torch.equal(arrived["pruned"], state["pruned"])
    assert wire.bytes_of(wide) - wire.bytes_of(narrow) == 2000


def test_weighted_sums():
    sums = {}
    wire.add_to(sums, {"a": torch.tensor([1.0, 2.0])}, 3)
    wire.add_to(sums, {"a": torch.tensor([10.0, 0.0])})
    assert sums["a"].tolist() == [13, 6]


def test_only_floating_tensors_are_averaged():
    state = {"w": torch.ones(1), "count": torch.tensor(3), "pruned": torch.tensor([True])}
    assert wire.averaged(state).keys() == {"w"}
