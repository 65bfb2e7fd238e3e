"""What holds for every strategy, and those of a few lines beside naive versions."""

import re
from dataclasses import fields

import pytest
import torch

from fedunlearn.apps.registry import STRATEGIES, strategy_of
from fedunlearn.config import STRATEGIES as NAMES
from fedunlearn.config import Unlearn
from fedunlearn.errors import UserError
from fedunlearn.runs.ledger import Ledger, State
from local_grid import equal
from naive import LEAVES, SETTINGS, assert_same, average, before, forgotten, pruned, trained

pytestmark = pytest.mark.usefixtures("known")


def test_every_name_has_its_strategy():
    assert tuple(STRATEGIES) == NAMES


def test_leaving_changes_nothing_but_the_neuron(federate):
    worker = before(federate)
    found, _ = forgotten(federate, "leave")
    assert equal(found, dict(pruned(worker, worker.model.state_dict())))


def test_retraining_is_the_run_in_which_the_client_never_took_part(federate):
    found, detail = forgotten(federate, "retrain")
    ledger = Ledger(federate.folder("gold") / "ledger.sqlite")
    ledger.file([3])
    ledger.close()
    federate(f"{SETTINGS} strategy=leave run=gold")
    assert equal(found, federate.state("gold"))
    assert detail["retrained"] == 2


def test_negation_turns_the_first_layer_and_trains_on(federate):
    worker = before(federate)
    found, _ = forgotten(federate, "negate")
    state = {name: value.clone() for name, value in worker.model.state_dict().items()}
    state["stem.0.weight"] = -state["stem.0.weight"]
    lr = worker.config.unlearn.recover_lr
    state = average(worker, {c: trained(worker, c, state, 3, lr=lr) for c in range(3)})
    assert_same(found, pruned(worker, state))


@pytest.mark.usefixtures("renewed")
def test_a_strategy_of_ones_own(federate):
    worker = before(federate)
    initial = {n: v.clone() for n, v in federate.worker(SETTINGS).model.state_dict().items()}
    federate(f"{SETTINGS} strategy=renewed:Renewed {LEAVES} run=own")
    (request,) = federate.requests("own")
    assert request.detail["renewed"] > 0
    last = {name: value for name, value in initial.items() if name.startswith("stages.3.")}
    state = {name: value.clone() for name, value in (worker.model.state_dict() | last).items()}
    lr = worker.config.unlearn.recover_lr
    state = average(worker, {c: trained(worker, c, state, 3, lr=lr) for c in range(3)})
    assert_same(federate.state("own"), pruned(worker, state))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:Strategy", "No module named 'nowhere'"),
        ("strategies.leave:Strategy", "has no attribute 'Strategy'"),
        ("fedunlearn.ledger:Ledger", "is no subclass of strategies.forgetting.Forgetting"),
    ],
)
def test_what_is_no_strategy_is_refused_with_the_reason(federate, name, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        strategy_of(name)
    with pytest.raises(UserError, match=re.escape(reason)):
        federate(f"strategy={name}")


@pytest.mark.parametrize(
    ("said", "reason"),
    [({"clients": [3]}, "returned 'clients', which a receipt says by itself"), ({"loss": torch.ones(1)}, "Tensor")],
)
def test_what_no_receipt_can_hold_ends_the_run_before_the_commit_and_can_be_corrected(
    federate, renewed, monkeypatch, said, reason
):
    own = strategy_of("renewed:Renewed")
    settings = f"{SETTINGS} strategy=renewed:Renewed {LEAVES}"
    with monkeypatch.context() as patch:
        patch.setattr(own, "forget", lambda *_: said)
        with pytest.raises(UserError, match=reason):
            federate(settings)
    assert federate.requests()[0].state == State.COLLECTING
    federate(settings)
    assert federate.requests()[0].state == State.COMPLETED


OTHERS = {
    "alpha": 3.0, "lambda_": 0.2, "exponent": 2.0, "head": "client", "estimator": "batch", "precision": "bf16",
    "share": 0.5, "tune": "fixed", "rounds": 1, "round_share": 0.7, "input_share": 0.3, "ridge": 0.5,
    "forget_epochs": 1, "flip": "true", "hold": 0.1, "lr": 0.03, "mend_lr": 0.02, "recover": 2,
    "recover_lr": 0.02, "ascent_epochs": 2, "ascent_lr": 0.01, "clip": 0.1, "every": 1, "calibration": 0.9,
    "recalibrate": "true",
}  # fmt: skip


@pytest.mark.parametrize("strategy", NAMES)
def test_a_strategy_depends_on_no_setting_that_it_does_not_name(federate, strategy):
    assert {*OTHERS, "attempts", "recovery_rounds"} == {field.name for field in fields(Unlearn)}
    assert set(STRATEGIES[strategy].reads) <= set(OTHERS)
    tune = "unlearn.tune=fixed unlearn.rounds=2"
    usual, _ = forgotten(federate, strategy, tune)
    unread = {name: value for name, value in OTHERS.items() if name not in STRATEGIES[strategy].reads}
    words = " ".join(f"unlearn.{name}={value}" for name, value in unread.items())
    federate(f"{SETTINGS} {tune} {words} strategy={strategy} {LEAVES} run=changed")
    assert equal(usual, federate.state("changed"))
