"""What a node may reply: everything that is not what was asked for, or cannot be true, is refused with its reason."""

import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from conftest import DIGITS, small
from fedunlearn.apps.client_app import app
from fedunlearn.composing import compose
from fedunlearn.federation import messages, replies, tasks
from fedunlearn.federation.claims import contradictions, disputed, too_many
from fedunlearn.federation.nodes import Nodes, assigned, for_clients
from fedunlearn.federation.server_data import ServerData
from local_grid import LocalGrid
from strategies.ssd import SelectiveDampening

ASKED = {
    "train": tasks.train,
    "evaluate": tasks.evaluate,
    "class_counts": tasks.class_counts,
    "batch_norm_statistics": tasks.batch_norm_statistics,
    "fisher": SelectiveDampening.fisher,
}


class Conversation:
    """Two nodes of a small federation, and what the second of them replied to each client task."""

    def __init__(self):
        words = "train.server_momentum=0 message_dtype=fp32 timeout=9 reply_band=5 client_share=0.9"
        config = compose(DIGITS, small(words))
        self.server, self.grid = ServerData(config), LocalGrid(2, app)
        self.nodes = Nodes(config, self.server.model, pixels=self.server.pixels)
        self.nodes.identify(self.grid, {})
        state = self.server.model.state_dict()
        self.sent = {name: self.nodes.messages(task, 1, range(4), state)[1] for name, task in ASKED.items()}
        self.replies = {name: self.grid.call(message) for name, message in self.sent.items()}

    def reply(self, task):
        """A copy of the reply, to be damaged."""
        content = self.replies[task].content
        copies = {name: type(record)(dict(record.items())) for name, record in content.items()}
        return Message(RecordDict(copies), reply_to=self.sent[task])

    def results(self, task, reply):
        return self.nodes.add_up(ASKED[task], [self.sent[task]], [reply])


@pytest.fixture(scope="module")
def talk():
    return Conversation()


def array(change):
    """Damage one array: `change` gets it as numpy, and gives another one or a whole `Array`."""

    def damage(reply, name="class_head.out.bias"):
        changed = change(reply.content["arrays"][name].numpy().copy())
        reply.content["arrays"][name] = changed if isinstance(changed, Array) else Array(changed)

    return damage


def raw(data):
    return array(lambda values: Array(str(values.dtype), values.shape, "numpy.ndarray", data))


def metric(record, name, value):
    def damage(reply):
        reply.content[record][name] = value

    return damage


def counted(column, value):
    """Change a count of the reply's first client."""

    def damage(reply):
        values = reply.content["metrics"][column]
        reply.content["metrics"][column] = [type(value)(v) for v in [value, *values[1:]]]

    return damage


def part(name, record):
    """Put another record in place of one, or leave it out."""

    def damage(reply):
        if record is None:
            del reply.content[name]
        else:
            reply.content[name] = record

    return damage


def renamed(reply):
    arrays = reply.content["arrays"]
    arrays["else"] = arrays.pop("class_head.out.bias")


def statistics(change):
    def damage(reply):
        changed = {name: change(tensor_of(a)) for name, a in reply.content["statistics"].items()}
        reply.content["statistics"] = ArrayRecord(changed)

    return damage


def tensor_of(array):
    return torch.from_numpy(array.numpy().copy())


def of_another_client(reply):
    statistics = reply.content["statistics"]
    statistics["3"] = statistics.pop(next(iter(statistics)))


def scaled(rows, column, by):
    return torch.cat([rows[:, :column], rows[:, column : column + 1] * by, rows[:, column + 1 :]], 1)


def first_row(change):
    """Damage the counts, sums or squares of the first layer's inputs."""
    return lambda reply: array(change)(reply, next(iter(reply.content["arrays"])))


FORM = {
    "NaN": array(lambda v: v * np.nan),
    "infinite": array(lambda v: v + np.inf),
    "int16": array(lambda v: v.astype(np.int16)),
    "uint8": array(lambda v: v.astype(np.uint8)),
    "float64": array(lambda v: v.astype(np.float64)),
    "complex": array(lambda v: v.astype(np.complex64)),
    "shape": array(lambda v: v[:-1]),
    "scalar": array(lambda v: np.asarray(v.sum())),
    "no bytes": raw(b""),
    "garbage": raw(b"\x93NUMPY garbage"),
    "pickle": raw(pickle.dumps([1.0] * 10)),
    "text": raw(b"ten numbers, honestly"),
    "names": renamed,
    "no arrays": part("arrays", None),
    "arrays of another kind": part("arrays", MetricRecord({"a": 1.0})),
    "a part that nobody asked for": part("more", ConfigRecord({"a": "b"})),
    "no metrics": part("metrics", None),
    "metrics of another kind": part("metrics", ConfigRecord({"client": "1"})),
    "no work": part("work", None),
    "work without fields": part("work", MetricRecord({})),
    "work as text": part("work", ConfigRecord({"seconds": "1"})),
    "work as a list": metric("work", "seconds", [1.0, 2.0]),
    "seconds": metric("work", "seconds", float("nan")),
    "negative seconds": metric("work", "seconds", -1.0),
    "absurd work": metric("work", "work", 1e308),
    "memory": metric("work", "mebibytes", float("inf")),
    "worker": metric("work", "worker", 0.5),
    "clients": metric("metrics", "client", [0, 3]),
    "one client twice": metric("metrics", "client", [1, 1]),
    "fewer clients": metric("metrics", "client", [1]),
    "clients as numbers with fractions": metric("metrics", "client", [1.5, 2.0]),
    "columns": metric("metrics", "loss", [1.0]),
}
COUNTS = {
    "negative examples": counted("examples", -5),
    "more examples than it has": counted("examples", 10**18),
    "half examples": counted("examples", 10.5),
    "more right than examples": counted("class_correct", 10**6),
    "negative hits": counted("client_correct", -1),
    "a NaN loss": counted("loss", float("nan")),
    "an infinite loss": counted("loss", float("inf")),
    "an absurd loss": counted("loss", 1e300),
    "another weight": metric("metrics", "weight", 1.5),
    "no weight": metric("metrics", "weight", 0.0),
    "a negative weight": metric("metrics", "weight", -3.0),
    "a NaN weight": metric("metrics", "weight", float("nan")),
    "more weight than examples": metric("metrics", "weight", 1e9),
}
LIES = {
    **{("train", name): lie for name, lie in {**FORM, **COUNTS}.items()},
    **{("fisher", name): lie for name, lie in {**FORM, **COUNTS}.items()},
    **{("evaluate", name): lie for name, lie in COUNTS.items()},
    ("evaluate", "arrays"): part("arrays", ArrayRecord({"a": torch.zeros(1)})),
    ("evaluate", "a negative loss"): counted("loss", -1.0),
    ("evaluate", "fewer examples"): counted("examples", 1),
    ("fisher", "below zero"): array(lambda v: -v - 1),
    ("train", "negative variance"): lambda r: array(lambda v: v - 1e6)(r, "stem.1.running_var"),
    ("train", "statistics of another client"): of_another_client,
    ("train", "statistics of more images"): statistics(lambda rows: rows * 1000),
    ("train", "statistics of half images"): statistics(lambda rows: scaled(rows, 0, 0.3)),
    ("train", "statistics without squares"): statistics(lambda rows: torch.cat([rows[:, :2], 0 * rows[:, 2:]], 1)),
    ("train", "NaN statistics"): statistics(lambda rows: rows * torch.nan),
    ("train", "statistics of another shape"): statistics(lambda rows: rows[1:]),
    ("class_counts", "negative"): statistics(lambda counts: counts - 1),
    ("class_counts", "more images"): statistics(lambda counts: counts * 2),
    ("class_counts", "none"): part("statistics", None),
    ("class_counts", "one client's"): lambda r: r.content["statistics"].pop("1"),
    ("class_counts", "sums that wrap"): statistics(lambda c: c * 0 + 2**62),
    ("class_counts", "fractions"): statistics(lambda counts: counts.float()),
    ("batch_norm_statistics", "more values"): first_row(lambda v: v * 1e6),
    ("batch_norm_statistics", "no values"): first_row(lambda v: v * 0),
    ("batch_norm_statistics", "other counts by channel"): first_row(lambda v: v * np.arange(1, v.shape[1] + 1)),
    ("batch_norm_statistics", "no squares"): first_row(lambda v: v * np.array([[1], [1], [0]])),
    ("batch_norm_statistics", "negative squares"): first_row(lambda v: v * np.array([[1], [1], [-1]])),
}


@pytest.mark.parametrize("task", ASKED)
def test_what_an_honest_node_replies_is_believed(talk, task):
    results = talk.results(task, talk.reply(task))
    assert sorted(results.counts) == messages.task_of(talk.sent[task]).clients


@pytest.mark.parametrize(("task", "lie"), LIES, ids=map(": ".join, LIES))
def test_a_lie_is_refused_and_whoever_sent_it_named(talk, caplog, task, lie):
    reply = talk.reply(task)
    LIES[task, lie](reply)
    with caplog.at_level("WARNING"):
        results = talk.results(task, reply)
    assert (results.counts, results.tensors, results.weight) == ({}, {}, 0)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fedunlearn"]
    assert line.startswith("round 1: node 1 (clients 1, 2) is left out: it")


@pytest.mark.parametrize("reason", ["", " \n ", None])
def test_an_error_that_says_nothing_is_an_error(talk, caplog, reason):
    reply = Message(Error(0, reason), reply_to=talk.sent["train"])
    assert not talk.results("train", reply).counts
    assert "is left out: unknown error" in caplog.text


def test_what_a_nodes_person_can_put_right_is_said_whole_and_without_the_class(talk, caplog):
    said = "2 files are not readable images:\n  a.png: cut off\n  b.png: empty\ndata.skip_bad=true goes on without"
    for kind, text in (("fedunlearn.errors.UserError", said), ("RuntimeError", "first\nlast")):
        talk.results("train", Message(Error(0, f"<class '{kind}'>:<'{text}'>"), reply_to=talk.sent["train"]))
    assert "is left out: 2 files are not readable images: a.png: cut off b.png: empty data.skip_bad" in caplog.text
    assert "is left out: last'>" in caplog.text


@given(st.lists(st.one_of(st.integers(), st.floats()), min_size=1, max_size=4), st.sampled_from(["client", "weight"]))
def test_no_numbers_make_reading_fail_otherwise(talk, values, column):
    reply = talk.reply("evaluate")
    kind = float if any(isinstance(value, float) for value in values) else int
    values = [kind(value) if abs(value) < 2**62 or value != value else kind(0) for value in values]
    reply.content["metrics"][column] = values
    expected = replies.Expected(tasks.evaluate, talk.server.model, "fp32", talk.nodes.examples, 64, {})
    try:
        found = expected.read(reply, talk.sent["evaluate"])
    except replies.RefusedError:
        return
    assert (sorted(found.counts), found.weight > 0) == ([1, 2], True)


# Who has what --------------------------------------------------------------------------------------------------------


def introduced(reply, **changes):
    for name, value in changes.items():
        reply.content["metrics"][name] = value
    return replies.introduction(reply, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"examples": [float("nan")] * 4}, "nan as examples"),
        ({"examples": [10**9, 1, 1, 1]}, "client 0 has 1000000000 examples"),
        ({"examples": [-1, 1, 1, 1]}, "client 0 has -1 examples"),
        ({"examples": [1, 1]}, "not in the expected form"),
        ({"client": [0, 1, 2, 9]}, "hosts clients 0, 1, 2, 9, of 4"),
        ({"client": [0, 0, 1, 2]}, "hosts clients 0, 0, 1, 2"),
        ({"nodes": 0}, "one of 0 nodes"),
        ({"nodes": 1.5}, "no whole number"),
        ({"nodes": [1, 2]}, "no whole number"),
    ],
)
def test_what_a_node_says_of_itself_must_be_possible(talk, changes, reason):
    (node,) = [node for node, place in talk.grid.nodes.items() if place == 1]
    content = messages.request(messages.Task(for_clients(talk.nodes.config), "identify", 0, []), {})
    message = Message(content, node, "query.identify")
    assert introduced(talk.grid.call(message)).examples == talk.nodes.examples
    with pytest.raises(replies.RefusedError, match=reason):
        introduced(talk.grid.call(message), **changes)


def test_who_contradicts_most_others_is_not_believed():
    honest = {0: 5, 1: 7}
    assert contradictions({10: honest, 11: honest, 12: honest | {1: 700}}, {}).keys() == {12}
    assert contradictions({10: honest, 11: honest | {1: 700}}, {}) == {}
    assert disputed({10: honest, 11: honest | {1: 700}}) == {1}
    assert contradictions({10: honest, 11: honest | {1: 700}}, honest).keys() == {11}
    assert contradictions({10: {0: 5}, 11: {1: 7}}, {}) == {}


def test_a_client_is_one_nodes():
    assert assigned([{0: 5, 1: 1, 2: 4}] * 2) == [[0], [1, 2]]
    assert assigned([{0: 5}, {0: 5, 1: 1}, {2: 3}]) == [[0], [1], [2]]
    assert assigned([{3: 5}, {3: 5}]) == [[3], []]
    everything = dict.fromkeys(range(6), 10)
    assert assigned([everything, {0: 10, 1: 10, 2: 10}]) == [[3, 4, 5], [0, 1, 2]]


def test_a_client_that_says_it_has_nearly_everything_is_not_believed():
    assert too_many({10: {0: 5, 1: 7}, 11: {2: 10**6}}, 0.9).keys() == {11}
    assert too_many({10: {0: 5, 1: 7}, 11: {2: 60}}, 0.9) == {}
    assert too_many({10: {0: 5}, 11: {1: 10**6}}, 0.9) == {}  # of two, nobody can say who has too many


def test_a_client_that_has_nearly_everything_is_believed_where_somebody_counted(federate):
    claims = {10: {0: 5, 1: 7}, 11: {2: 300}}
    assert too_many(claims, 0.9, known={2: 300}) == {}
    (reason,) = too_many(claims, 0.9, known={2: 299}, name="abc".__getitem__).values()
    assert reason == (
        "it says that client c has 300 examples, more than 0.9 of all 312 (client_share); if it has them, start again "
        "with client_share=1"
    )
    federate("rounds=1 client_share=0.01")
    assert federate.run().metrics()[-1]["clients"] == [0, 1, 2, 3]
