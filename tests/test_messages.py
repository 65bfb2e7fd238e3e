import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.federation import messages
from fedunlearn.federation.messages import Task
from fedunlearn.nn.evaluate import Counts

TASK = Task("{}", "train", 3, [0, 4])


def message(content):
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(content, 7, "train")


def test_what_is_sent_arrives():
    state = {"b": torch.randn(2, 3), "a": torch.tensor([True, False]), "n": torch.tensor(5)}
    task = Task('{"x": 1}', "climb", 3, [0, 4], '{"until": 0.5}')
    sent = message(messages.request(task, {"arrays": messages.pack(state, "fp32")}))
    assert messages.task_of(sent) == task
    arrived = messages.unpack(sent)
    assert list(arrived) == list(state)
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in arrived.items())
    counts = {4: Counts(10, 2.5, 7, 3), 0: Counts(1)}
    sums = messages.pack({"b": state["b"]}, "fp32")
    reply = messages.reply(sent, counts, sums, weight=11, statistics={"4": torch.ones(2)})
    assert messages.counts_of(reply) == counts
    assert messages.weight_of(reply) == 11
    assert messages.unpack(reply).keys() == {"b"}
    assert torch.equal(messages.unpack(reply, "statistics")["4"], torch.ones(2))


def test_a_reply_of_counts_alone_has_no_tensors():
    reply = messages.reply(message(messages.request(TASK, {})), {0: Counts(1)})
    assert (messages.unpack(reply), messages.unpack(reply, "statistics"), messages.weight_of(reply)) == ({}, {}, 0)


def test_arguments_of_a_task_arrive_as_they_were_sent():
    given = {
        "until": 0.1,
        "radius": None,
        "last": True,
        "correct_fraction": {"3": 0.5},
        "nothing": {},
        "predictions": torch.randn(3, 2),
        "projectors": {"stem.0": torch.eye(2), "half": torch.ones(2, dtype=torch.float16)},
    }
    text, records = messages.pack_arguments(given)
    task = Task("{}", "relabel", 0, [], text)
    sent = message(messages.request(task, {"arrays": messages.pack({"a": torch.zeros(1)}, "bf16"), **records}))
    arrived = messages.arguments_of(sent)
    assert arrived.keys() == given.keys()
    assert torch.equal(arrived.pop("predictions"), given.pop("predictions"))
    projectors = arrived.pop("projectors")
    assert all(torch.equal(value, projectors[name]) for name, value in given.pop("projectors").items())
    assert projectors["half"].dtype == torch.float16
    assert arrived == given
    assert messages.unpack(sent).keys() == {"a"}


def test_in_bf16_what_is_fp32_travels_in_half_the_bytes_and_all_else_as_it_is():
    state = {"w": torch.randn(1000), "statistics": torch.randn(3, dtype=torch.float64), "pruned": torch.tensor([True])}
    wide, narrow = (
        message(messages.request(TASK, {"arrays": messages.pack(state, dtype)})) for dtype in ("fp32", "bf16")
    )
    arrived = messages.unpack(narrow)
    assert torch.equal(arrived["w"], state["w"].bfloat16().float())
    assert torch.equal(arrived["statistics"], state["statistics"])
    assert torch.equal(arrived["pruned"], state["pruned"])
    assert messages.bytes_of(wide) - messages.bytes_of(narrow) == 2000


def test_weighted_sums():
    sums = {}
    messages.add_to(sums, {"a": torch.tensor([1.0, 2.0])}, 3)
    messages.add_to(sums, {"a": torch.tensor([10.0, 0.0])})
    assert sums["a"].tolist() == [13, 6]


def test_only_floating_tensors_are_averaged():
    state = {"w": torch.ones(1), "count": torch.tensor(3), "pruned": torch.tensor([True])}
    assert messages.floating(state).keys() == {"w"}


def test_a_running_variance_is_not_rounded():
    """What decays to nothing by many rounded changes would end below zero."""
    state = {"0.running_var": torch.rand(100), "0.running_mean": torch.randn(100)}
    arrived = messages.unpack(message(messages.request(TASK, {"arrays": messages.pack(state, "bf16")})))
    assert all(torch.equal(arrived[name], value) for name, value in state.items())
