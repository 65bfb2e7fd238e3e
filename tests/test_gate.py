"""The gate that every new model passes before it replaces the old one."""

import base64
import json
from dataclasses import replace

import pytest
import torch
from flwr.app import Error, Message

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.federation.gate import changed_fraction, total, without_extremes
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs.budget import Figures, refusal
from fedunlearn.runs.ledger import State
from fedunlearn.runs.statement import gate_reason
from fedunlearn.runs.uncertainty import Estimate, fraction
from fedunlearn.runs.verifying import verified
from local_grid import LocalGrid, equal
from test_relabel import telling

MANY = 10**6
PARAMS = {"w": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor(3)}
BEFORE = Figures(fraction(0.9, MANY), fraction(0.6, MANY), fraction(0.95, MANY) - fraction(0.6, MANY))
CHANGED = {"w": torch.tensor([1.0, 2.0, 4.0]), "n": torch.tensor(3)}
GOOD = Figures(fraction(0.88, MANY), fraction(0.59, MANY), fraction(0.6, MANY) - fraction(0.59, MANY))


def refused(before, after, budget=0.05, retrained=0.6, error=0.01):
    test_fall = Estimate(before.test.value - after.test.value, error)
    return refusal(before, after, test_fall=test_fall, retrained=retrained, budget=budget)


def test_a_good_model_passes():
    assert refused(BEFORE, GOOD) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"retain": fraction(0.84, MANY)}, "accuracy on the retain clients' images is 0.840, to be 0.850 at least"),
        (
            {"test": fraction(0.1, MANY)},
            r"accuracy on held-out images is 0.100, to be 0.550 at least \(forget.budget=0.05\)",
        ),
        ({"gap": fraction(0.97, MANY) - fraction(0.6, MANY)}, r"grows from \+0.350 to \+0.370"),
        ({"gap": BEFORE.gap}, r"nothing is forgotten: the memorisation gap was \+0.350, and is \+0.350"),
        ({"gap": fraction(0.93, MANY) - fraction(0.6, MANY)}, "nothing is forgotten"),
    ],
)
def test_a_model_that_is_destroyed_or_has_forgotten_nothing_does_not_pass(change, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(refused(BEFORE, replace(GOOD, **change)))


def test_the_budget_is_what_may_be_lost():
    lost = replace(GOOD, retain=fraction(0.8, MANY))
    assert refused(BEFORE, lost)
    assert not refused(BEFORE, lost, budget=0.11)
    assert not refused(
        BEFORE, replace(GOOD, test=fraction(0.55, MANY)), error=0.0
    )  # 0.6 - 0.55 is above 0.05 in floats


def test_of_few_images_chance_is_not_called_a_loss():
    assert not refused(BEFORE, replace(GOOD, test=fraction(0.5, 20)), error=0.11)
    assert refused(BEFORE, replace(GOOD, test=fraction(0.4, 20)), error=0.11)


@pytest.mark.parametrize("fall", [0.06, 0.2])
def test_a_loss_that_is_no_chance_may_not_exceed_the_budget_by_anything(fall):
    assert refused(BEFORE, replace(GOOD, test=fraction(0.6 - fall, MANY)), error=0.029)
    assert refused(BEFORE, replace(GOOD, retain=fraction(0.9 - fall, 10_000)))


def scores(*accuracies):
    return {str(client): {"class": value, "examples": 100} for client, value in enumerate(accuracies)}


@pytest.mark.parametrize("lie", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("liar", range(4))
@pytest.mark.parametrize(("honest", "is_refused"), [(0.9, False), (0.2, True)])
def test_no_retain_client_alone_decides_whether_a_model_passes(liar, lie, honest, is_refused):
    said = [lie if client == liar else honest for client in range(4)]
    old, new = map(total, without_extremes(scores(0.9, 0.9, 0.9, 0.9), scores(*said)))
    assert bool(refused(replace(BEFORE, retain=old), replace(GOOD, retain=new))) == is_refused


def test_a_retain_client_that_replies_once_does_not_count():
    old, new = without_extremes(scores(0.9, 0.9, 0.9), scores(0.8, 0.9))
    assert (total(old).value, total(new).value) == pytest.approx((0.9, 0.85))


def test_two_retain_clients_both_count():
    old, new = without_extremes(scores(0.9, 0.9), scores(0.1, 0.9))
    assert (total(old).value, total(new).value) == pytest.approx((0.9, 0.5))
    assert total([]) is None


def test_what_the_retrained_model_would_not_know_either_is_not_called_a_loss():
    without_a_class = replace(GOOD, test=fraction(0.5, MANY))
    assert refused(BEFORE, without_a_class)
    assert not refused(BEFORE, without_a_class, retrained=0.52)
    assert refused(BEFORE, replace(GOOD, test=fraction(0.54, MANY)), retrained=0.9)


def test_where_nothing_was_memorised_nothing_has_to_be_gone():
    unknown = replace(BEFORE, gap=fraction(0.61, MANY) - fraction(0.6, MANY))
    assert not refused(unknown, replace(GOOD, gap=unknown.gap))


def test_the_fraction_of_values_that_changed():
    assert changed_fraction(PARAMS, PARAMS) == 0
    assert changed_fraction(PARAMS, CHANGED) == pytest.approx(1 / 3)


# In a run ------------------------------------------------------------------------------------------------------------

LEARNED = "rounds=8 train.epochs=3 data.limit=200 data.test_limit=100"
ASKS = f"{LEARNED} fork=before forget.schedule={{8:[3]}} forget.gate=true"
DESTRUCTIVE = {
    "ssd": "strategy=ssd unlearn.tune=fixed unlearn.alpha=0.01 unlearn.lambda_=0",
    "ascent": "strategy=ascent unlearn.lr=5 unlearn.repair_rounds=0",
    "negate": "strategy=negate unlearn.repair_rounds=0",
}


@pytest.fixture
def trained(federate):
    """A run that knows something: what is destroyed has to be there."""
    federate.shared(f"{LEARNED} strategy=leave")
    return federate


@pytest.mark.parametrize("strategy", DESTRUCTIVE)
def test_a_destroyed_model_is_never_taken(trained, capsys, strategy):
    before = trained.state("before")
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} {DESTRUCTIVE[strategy]}")
    (request,) = trained.requests()
    assert request.state == State.QUARANTINED
    gate = request.detail["gate"]
    assert not gate["passed"]
    assert gate["reason"] == request.detail["reason"]
    if "gone astray" not in gate["reason"]:
        assert (
            gate["retain"][1] < gate["retain"][0] - gate["budget"] or gate["test"][1] < gate["test"][0] - gate["budget"]
        )
        assert 0 < gate["changed"] <= 1
        assert gate["measured_by"]["gap"] == "the forget clients"
    assert equal(trained.state(), before)
    assert trained.run().ledger.current().round == 8
    said = capsys.readouterr().err
    assert "the model stays as it was" in said
    assert "fedunlearn forget --accept=r1 --by=NAME --run=" in said


def test_a_request_that_changes_nothing_of_a_memorised_client_is_not_completed(trained):
    examples = trained.pooled(LEARNED).examples(3)
    grid = telling(lambda client: Counts(examples, 0.1, examples), [3])
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} strategy=leave", grid=grid)
    assert trained.requests()[0].detail["reason"].startswith("nothing is forgotten: the memorisation gap was +")


def test_one_lost_reply_does_not_spare_a_model_the_question_what_it_still_knows(trained):
    examples = trained.pooled(LEARNED).examples(3)
    grid, left = telling(lambda client: Counts(examples, 0.1, examples), [3]), [1]
    as_told = grid.deliver

    def deliver(message):
        task = messages.task_of(message)
        if (task.name, left[0]) == ("class_counts", 1) and 3 in task.clients:
            left[0] = 0
            return Message(Error(0, "lost"), reply_to=message)
        return as_told(message)

    grid.deliver = deliver
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} strategy=leave", grid=grid)
    assert trained.requests()[0].detail["reason"].startswith("nothing is forgotten: the memorisation gap was +")


def without(client):
    """A grid on which a client never replies."""
    grid = LocalGrid(4)

    def deliver(message):
        if messages.task_of(message).clients == [client] and message.metadata.message_type != "query.identify":
            return Message(Error(0, "gone"), reply_to=message)
        return grid.call(message)

    grid.deliver = deliver
    return grid


@pytest.mark.parametrize("strategy", ["retrain", "leave"])
def test_of_a_client_that_is_gone_the_gate_asks_nothing(trained, capsys, strategy):
    trained(f"{ASKS} strategy={strategy} forget.budget=1", grid=without(3))
    (request,) = trained.requests()
    gate = request.detail["gate"]
    assert (request.state, gate["passed"], "gap" in gate) == (State.COMPLETED, True, False)
    assert gate["measured_by"].keys() == {"retain", "test"}
    assert "Client 3 did not reply: nobody says how well the model knows its images" in capsys.readouterr().err
    receipt = verified((trained.folder() / "receipts" / "r1.json").read_bytes())
    assert (gate_reason(receipt.gate), receipt.gate["measured_by"]) == ("", gate["measured_by"])


def test_a_strategy_that_needs_the_client_does_not_go_without(trained):
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} strategy=subset forget.attempts=1", grid=without(3))
    assert trained.requests()[0].detail["reason"] == "client 3 did not reply to evaluate"


def test_training_goes_on_without_the_client_of_a_request_that_was_set_aside(trained):
    grid = LocalGrid(4)
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} rounds=9 {DESTRUCTIVE['ssd']}", grid=grid)
    assert trained.run().metrics()[-1]["clients"] == [0, 1, 2]


def test_a_model_that_is_not_finite_is_never_taken_whoever_asks_for_it(trained, capsys, monkeypatch):
    def ruin(strategy, federation, forget):
        with federation.editing() as model:
            model.class_head.out.bias.data.fill_(torch.nan)
        return {}

    monkeypatch.setattr("strategies.leave.LeaveAndContinue.forget", ruin)
    before = trained.state("before")
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} strategy=leave")
    assert trained.requests()[0].detail["reason"] == "class_head.out.bias of the new model is not finite"
    assert command("forget", "--accept", "r1", "--by", "Dr. Who", "--run", "test", "--engine", "local") == 1
    assert trained.requests()[0].state == State.QUARANTINED
    assert equal(trained.state(), before)
    assert "is left out" not in capsys.readouterr().err


def test_a_person_can_take_the_model_all_the_same_and_the_receipt_says_who(trained, capsys):
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} {DESTRUCTIVE['ascent']}")
    trained.run().ledger.accept("r1", "Dr. Who")  # and then a signal ended the command
    assert command("forget", "--accept", "r1", "--by", "Somebody else", "--run", "test", "--engine", "local") == 2
    assert command("forget", "--accept", "r1", "--by", "Dr. Who", "--run", "test", "--engine", "local") == 0
    (request,) = trained.requests()
    assert request.state == State.COMPLETED
    assert request.detail["accepted_by"] == "Dr. Who"
    assert request.detail["gate"]["passed"] is False
    assert not equal(trained.state(), trained.state("before"))
    assert command("forget", "--accept", "r1", "--by", "Dr. Who", "--run", "test") == 2
    assert "request r1 is not needed any more: r1 is COMPLETED" in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--by", "Dr. Who", "--client", "3"), ("--by", "Dr. Who", "--dry-run")])
def test_who_takes_it_says_so_and_asks_for_nothing_else(trained, capsys, words):
    assert command("forget", "--accept", "r1", "--run", "before", *words) == 2
    assert "--accept ID goes with --by NAME" in capsys.readouterr().err


OTHERWISE = (
    "strategy=relabel",
    "unlearn.epochs=1",
    "unlearn.passes=1",
    "unlearn.most_rounds=1",
    "unlearn.guide_images=30",
    "unlearn.rounds=1",
)


def test_what_was_set_aside_can_be_asked_for_again_with_another_strategy_and_other_settings(trained, memorised):
    with pytest.raises(UserError, match="request r1 is QUARANTINED"):
        trained(f"{ASKS} {DESTRUCTIVE['ssd']}")
    about = ("--run", "test", "--engine", "local", "--client", "3")
    assert command("forget", *about, "--accept", "r1", *OTHERWISE) == 2
    assert command("forget", *about, *OTHERWISE, "unlearn.repair_lr=100") == 1  # the gate is still there
    trained.run().ledger.close()
    assert command("forget", *about, *OTHERWISE) == 0
    first, second, third = trained.requests()
    assert [first.state, second.state, third.state] == [State.QUARANTINED, State.QUARANTINED, State.COMPLETED]
    assert third.detail["strategy"] == "relabel"
    assert third.detail["how"]["unlearn"]["epochs"] == 1
    trained(f"{ASKS} {' '.join(OTHERWISE)} run=other")
    assert equal(trained.state(), trained.state("other"))
    receipt = json.loads((trained.folder() / "receipts" / "r3.json").read_text())
    said = json.loads(base64.b64decode(receipt["payload"]))["predicate"]
    assert said["how"]["strategy"] == said["strategy"] == "relabel"
    assert said["settings"]["strategy"] == "ssd"
    assert command("verify", str(trained.folder() / "receipts" / "r3.json")) == 0


OWN = """
import fedunlearn

class Fails(fedunlearn.Strategy):
    def forget(self, federation, forget):
        raise LookupError("nothing there")

class Says(fedunlearn.Strategy):
    def forget(self, federation, forget):
        return {"sha256": "mine"}

class Sure(fedunlearn.Strategy):
    def forget(self, federation, forget):
        with federation.editing() as model:
            for parameter in model.class_head.parameters():
                parameter.data.mul_(1e6)
        return {}
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Fails", "failed with LookupError: nothing there"),
        ("Says", "Says.forget returned 'sha256', which a receipt says by itself"),
        ("Sure", "the loss on held-out images is"),
        ("gone", "No module named 'own_gone'"),
    ],
)
def test_a_strategy_that_a_request_alone_has_asked_for_stops_nothing_else(trained, monkeypatch, tmp_path, name, reason):
    module = f"own_{name.lower()}"
    tmp_path.joinpath(f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    trained(f"{LEARNED} fork=before forget.gate=true strategy=leave")
    about = ("--run", "test", "--engine", "local")
    if name == "gone":
        how = {"strategy": f"{module}:Sure", "unlearn": {}}
        tmp_path.joinpath(f"{module}.py").unlink()
        run = trained.run()
        run.ledger.advance(run.request([3], how=how).requests()[0], State.COLLECTING)
        assert command("forget", *about, "--client", "1", "strategy=leave") == 0
    else:
        assert command("forget", *about, "--client", "3", f"strategy={module}:{name}") == 1
        assert command("forget", *about, "--client", "1", "strategy=leave") == 0
    first, second = trained.requests()
    assert (first.state, second.state) == (State.QUARANTINED, State.COMPLETED)
    assert reason in first.detail["reason"]
    assert (trained.folder() / "receipts" / "r1.json").exists()
