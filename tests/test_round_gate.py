"""A round that would destroy the model: whose reply does it is found and named, and innocents are not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.errors import NotNowError, UserError
from fedunlearn.federation import messages, tasks
from fedunlearn.federation.handle import ForgetSet
from fedunlearn.federation.replies import Results
from fedunlearn.federation.round_gate import RoundGate, limit, without_destroyers
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.server_state import softened
from fedunlearn.nn.evaluate import Counts
from local_grid import LocalGrid, equal
from strategies.ssd import SelectiveDampening

WORDS = "rounds=3 train.precision=fp32 message_dtype=fp32 reply_band=0"


def parts(*values):
    return [Results({"w": torch.tensor([float(value)])}, 1.0) for value in values]


def combine(replies):
    return {"w": sum(one.tensors["w"] for one in replies) / len(replies)}


def loss(update):
    """How far the mean is from 1."""
    value = abs(float(update["w"]) - 1)
    return value if math.isfinite(value) else math.inf


def test_the_limit_counts_from_guessing_where_the_model_is_better():
    assert limit(0.1, 10, 10) == pytest.approx(10 * math.log(10))
    assert limit(5.0, 10, 10) == 50


@settings(deadline=None)
@given(st.integers(3, 9), st.data())
def test_whoever_destroys_is_dropped_and_nobody_else(count, data):
    liars = data.draw(st.sets(st.integers(0, count - 1), max_size=(count - 1) // 2))
    lies = st.sampled_from([1e6, -1e9, math.inf, math.nan])
    replies = parts(*(data.draw(lies) if place in liars else 1 + place / 10 for place in range(count)))
    found = without_destroyers(replies, combine, loss, 5.0)
    assert found is not None
    assert {replies.index(one) for one in found.dropped} <= liars
    assert loss(combine(found.kept)) <= 5


def test_where_half_would_have_to_go_nobody_is_to_blame():
    assert without_destroyers(parts(1e6, 1e6, 1, 1), combine, loss, 5.0) is None
    assert without_destroyers(parts(1e6), combine, loss, 5.0) is None


class Four:
    """Four nodes with a client each."""

    mean = staticmethod(combine)

    def node_of(self, counts):
        return min(counts)

    def listed(self, counts):
        return min(counts)


@pytest.mark.parametrize(
    ("values", "outsized", "dropped"),
    [
        ([1, 1, 1, 5], {3}, [3]),  # the loss is 0 before, and 1 with all: below that of guessing, above what is usual
        ([1, 1, 1, 5], set(), []),  # honest clients may send that
        ([1, 1, 1, 5], {2}, []),  # nor is anybody else to blame
        ([1, 1, 1, 1.4], {3}, []),  # it does no harm
        ([1, 1, 1, 1e6], {3}, [3]),
        ([1, 1, 1, 1e6], set(), [3]),
    ],
)
def test_a_large_update_may_do_less_harm_than_others(values, outsized, dropped):
    replies = parts(*values)
    for client, one in enumerate(replies):
        one.counts, one.outsized = {client: Counts(1)}, {client} & outsized

    def asked(on_reply=lambda one: None):
        total = Results()
        for one in replies:
            on_reply(one)
            total.include(one)
        return total

    before = {"w": torch.tensor(1.0)}
    gate = RoundGate(Four(), lambda update: loss(update or before), classes=10, band=1.3)
    kept, out = gate.passed(asked(), 1, asked)
    assert [min(one.counts) for one in out] == dropped
    assert sorted(kept.counts) == [client for client in range(4) if client not in dropped]
    assert float(kept.mean()["w"]) == pytest.approx(sum(values[c] for c in kept.counts) / len(kept.counts))


def test_whoever_is_silent_when_all_are_asked_again_is_out_and_where_all_are_nothing_is_taken():
    replies = parts(1, 1, 1, 1e6)
    for client, one in enumerate(replies):
        one.counts = {client: Counts(1)}

    def answer(number):
        def asked(on_reply=lambda one: None):
            total = Results()
            for one in replies[:number]:
                on_reply(one)
                total.include(one)
            return total

        return asked

    gate = RoundGate(Four(), lambda update: loss(update or {"w": torch.tensor(1.0)}), classes=10, band=1.3)
    kept, out = gate.passed(answer(4)(), 1, answer(3))  # the liar says nothing more
    assert [min(one.counts) for one in out] == [3]
    assert sorted(kept.counts) == [0, 1, 2]
    with pytest.raises(NotNowError, match="nobody answered"):
        gate.passed(answer(4)(), 1, answer(0))


def lying(federate, lie, words="", nodes=4, round_=2):
    grid = LocalGrid(nodes)

    def deliver(message):
        reply, task = grid.call(message), messages.task_of(message)
        if task.name == "train" and 1 in task.clients and task.round == round_:
            values = messages.unpack(reply)
            changed = {n: v if n.endswith(messages.STATISTICS) else lie(v) for n, v in values.items()}
            reply.content["arrays"] = messages.pack(changed, "fp32")
        return reply

    grid.deliver = deliver
    federate(f"{WORDS} {words}", grid=grid)


@pytest.mark.parametrize(
    "lie",
    [
        lambda v: torch.full_like(v, 1e30),
        lambda v: 1e6 * v,
        pytest.param(lambda v: torch.full_like(v, 3.4e38), marks=pytest.mark.thorough),
        pytest.param(lambda v: v + 1e4, marks=pytest.mark.thorough),
    ],
)
def test_the_liar_alone_is_named_and_the_round_is_that_of_the_others(federate, lie, capsys):
    lying(federate, lie)
    named = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert len(named) == 1
    assert named[0].startswith("round 2: node 1 (clients 1) is left out: with its update")
    rows = [row for row in federate.run().metrics() if row["kind"] == "round"]
    assert [row["clients"] for row in rows] == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert all(value.isfinite().all() for value in federate.state().values() if value.is_floating_point())
    assert rows[-1]["test"]["class"] > 0
    bytes_ = [row["train"]["bytes"] for row in rows]
    assert bytes_ == [bytes_[0], 2 * bytes_[0], bytes_[0]]

    def silent(message):
        task = messages.task_of(message)
        return None if task.name == "train" and task.clients == [1] and task.round == 2 else grid.call(message)

    grid = LocalGrid(4)
    grid.deliver = silent
    federate(f"{WORDS} timeout=1 run=without", grid=grid)
    assert equal(federate.state(), federate.state("without"))


LEARNED = (
    "data.limit=300 train.epochs=4 train.batch_size=16 train.crop_padding=0 train.lr=0.05 train.server_momentum=0 "
    "reply_band=300"
)


@pytest.mark.thorough
@pytest.mark.parametrize("times", [-10, 10])
def test_an_update_that_spoils_a_good_model_without_destroying_it_is_found(federate, times, capsys):
    federate.shared(f"{WORDS} {LEARNED} rounds=5", nodes=4)
    for run, band in {"kept": 1.3, "taken": 0}.items():
        lying(federate, lambda v: times * v, f"{LEARNED} rounds=6 fork=before run={run} round_band={band}", round_=6)
    named = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert len(named) == 1
    assert named[0].startswith("round 6: node 1 (clients 1) is left out: with its update")
    kept, taken = (federate.run(run).metrics()[-1]["test"]["class"] for run in ("kept", "taken"))
    assert kept > taken + 0.2


def test_a_stored_update_of_a_liar_is_dropped(federate):
    lying(federate, lambda v: 1e6 * v, "strategy=federaser unlearn.every=2")
    stored = sorted(file.name for file in (federate.folder() / "updates" / "after-0").iterdir())
    assert stored == [f"round-00002-client-{client}.safetensors" for client in (0, 2, 3)]


def test_where_training_diverges_for_everybody_nobody_is_named(federate, capsys):
    with pytest.raises(UserError, match="whoever is left out"):
        federate(f"{WORDS} train.lr=100")
    assert "is left out" not in capsys.readouterr().err


def test_without_a_band_everything_finite_is_taken(federate):
    lying(federate, lambda v: 100 * v, "round_band=0")
    assert [row["clients"] for row in federate.run().metrics() if row["kind"] == "round"] == [[0, 1, 2, 3]] * 3


def test_an_honest_run_is_the_same_with_and_without_the_band(federate):
    federate(f"{WORDS} run=with")
    federate(f"{WORDS} round_band=0 run=without")
    assert equal(federate.state("with"), federate.state("without"))


def test_running_statistics_that_destroy_the_model_are_found_where_nothing_else_replaces_them(federate, capsys):
    grid = LocalGrid(4)

    def deliver(message):
        reply, task = grid.call(message), messages.task_of(message)
        if task.name == "train" and task.clients == [1] and task.round == 2:
            values = messages.unpack(reply)
            changed = {n: v - 1e3 if n.endswith("running_mean") else v for n, v in values.items()}
            reply.content["arrays"] = messages.pack(changed, "fp32")
        return reply

    grid.deliver = deliver
    federate(f"{WORDS} batch_norm_fraction=0", grid=grid)
    named = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert len(named) == 1
    assert named[0].startswith("round 2: node 1 (clients 1) is left out")
    assert federate.run().metrics()[1]["clients"] == [0, 2, 3]


def test_where_nobody_can_use_the_model_nobody_is_named(federate, capsys):
    with pytest.raises(UserError, match=r"round 1: the model has gone astray: 4 of 4 nodes could not use it \(train"):
        federate(f"{WORDS} train.lr=100 train.epochs=9", grid=LocalGrid(4))
    assert "is left out" not in capsys.readouterr().err


# In a request --------------------------------------------------------------------------------------------------------


def requested(federate, task, client, damage, words):
    """Client 3 asks after three rounds, and while it is served a client sends something else for a task, every time."""
    grid, rounds = LocalGrid(4), []

    def deliver(message):
        reply, asked = grid.call(message), messages.task_of(message)
        rounds.append((asked.name, asked.round))
        served = ("train", 3) in rounds and ("class_counts", 3) in rounds
        return damage(reply) if served and (asked.name, asked.clients) == (task, [client]) else reply

    grid.deliver = deliver
    federate(f"{WORDS} {words} forget.schedule={{3:[3]}} forget.gate=true", grid=grid)


def larger(times, dtype="fp32"):
    def damage(reply):
        values = messages.unpack(reply)
        changed = {n: v if n.endswith(messages.STATISTICS) else times * v for n, v in values.items()}
        reply.content["arrays"] = messages.pack(changed, dtype)
        return reply

    return damage


def test_who_would_destroy_a_model_in_a_request_is_named_alone_and_the_rest_repair(federate, capsys):
    requested(federate, "train", 1, larger(-1e6), "strategy=retrain run=lied")
    named = [line for line in capsys.readouterr().err.splitlines() if "is left out" in line]
    assert named
    assert all("node 1 (clients 1) is left out: with its update" in line for line in named)
    requested(federate, "train", 1, lambda reply: None, "strategy=retrain run=silent timeout=1")
    assert equal(federate.state("lied"), federate.state("silent"))
    lied, silent = (federate.requests(run)[0].detail["costs"]["train"] for run in ("lied", "silent"))
    assert (lied["queries"], lied["bytes"]) == (2 * silent["queries"], 3 * silent["bytes"])  # 3 reply twice, 2 once


@pytest.mark.thorough
def test_who_alone_cannot_use_a_model_gone_astray_is_not_blamed(federate, capsys, monkeypatch):
    def ruin(strategy, federation, forget):
        with federation.editing() as model:
            model.class_head.out.bias.data[0] = 1000 * strategy.settings.lr
        federation.run(tasks.train, on=federation.retain)
        return {}

    def not_a_number(reply):
        tensors = messages.unpack(reply)
        reply.content["arrays"] = messages.pack(tensors | {"class_head.out.bias": torch.full((10,), torch.nan)}, "fp32")
        return reply

    monkeypatch.setattr("strategies.ascent.GradientAscent.forget", ruin)
    for lr, said in {0.01: "could not take part: the model has gone astray", 1e-9: "is left out: it sent NaN"}.items():
        words = f"run=r{lr} strategy=ascent unlearn.lr={lr} forget.budget=1 data.limit=200 train.epochs=8"
        requested(federate, "train", 1, not_a_number, words)
        lines = [line for line in capsys.readouterr().err.splitlines() if "(clients 1)" in line]
        assert lines
        assert all(said in line for line in lines)


def test_when_a_forget_client_leads_the_model_astray_nobody_who_repairs_is_named(federate, capsys, memorised):
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        requested(federate, "relabel", 3, larger(1e15, "bf16"), "strategy=relabel unlearn.guide_images=30")
    reason = federate.requests()[0].detail["reason"]
    assert reason.startswith("the model has gone astray: 3 of 3 nodes could not use it (repair: it sent")
    assert reason.endswith("; client 3 had answered to relabel before")
    assert "is left out" not in capsys.readouterr().err


@pytest.mark.parametrize("spoilt", [False, True])
def test_who_sends_a_bad_fisher_of_a_softened_model_is_blamed_if_the_model_itself_is_good(federate, capsys, spoilt):
    federate.shared(f"{WORDS} {LEARNED} rounds=1 train.epochs=5", nodes=4)
    federation = Rounds.assemble(federate.run("before")).federation
    grid = federation.grid = LocalGrid(4)
    federation.nodes.identify(grid, {})

    def deliver(message):
        reply = grid.call(message)
        if messages.task_of(message).clients == [1]:
            tensors = messages.unpack(reply)
            reply.content["arrays"] = messages.pack({n: torch.nan * v for n, v in tensors.items()}, "fp32")
        return reply

    grid.deliver = deliver
    with federation.applying(ForgetSet((3,))):
        if spoilt:
            federation.state = softened(federation.state, 100)
        with federation.softened(100.0):
            federation.run(SelectiveDampening.fisher, on=[0, 1, 2])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "(clients 1)" in line]
    assert ("is left out: it sent NaN" in line, "the model has gone astray" in line) == (not spoilt, spoilt)
