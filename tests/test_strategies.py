"""What holds for every strategy, those of a few lines beside naive versions, and strategies of one's own."""

import re

import pytest
import torch
from pydantic import Field

from fedunlearn import NotNowError, Settings, Strategy, Update, UserError, client_task
from fedunlearn.federation import messages, tasks
from fedunlearn.federation.strategy import settings_for, strategy_class, strategy_names
from fedunlearn.runs.ledger import Ledger, State
from local_grid import LocalGrid, asked, equal, kinds
from naive import FORGETS, SETTINGS, assert_same, average, before, forgotten, pruned, settings_of, trained

EVERYTHING = {"ascent", "federaser", "gradients", "leave", "negate", "pga", "relabel", "retrain", "ssd", "subset"}


def test_the_strategies_that_are_installed():
    assert {*strategy_names()} == EVERYTHING
    labels = {strategy_class(name).label for name in EVERYTHING}
    assert len(labels) == len(EVERYTHING)


def test_leave_changes_nothing_but_the_neuron(federate):
    pooled = before(federate)
    found, _ = forgotten(federate, "leave")
    assert equal(found, pruned(pooled.state()))


def test_retraining_is_the_run_in_which_the_client_never_took_part(federate):
    found, detail = forgotten(federate, "retrain", grid=LocalGrid(2))
    ledger = Ledger(federate.folder("retrained") / "ledger.sqlite")
    ledger.file([3])
    ledger.close()
    federate(f"{SETTINGS} strategy=leave run=retrained")
    assert equal(found, federate.state("retrained"))
    assert detail["retrained"] == 2


@pytest.mark.parametrize("strategy", ["subset", "federaser", "negate", "retrain"])
def test_a_client_of_round_0_never_takes_part_whatever_the_strategy(federate, strategy):
    """A model that nobody has trained knows nobody: nothing is asked of the client."""
    grid = LocalGrid(2)
    federate(f"{settings_of(strategy)} rounds=1 forget.schedule={{0:[3]}} run=without", grid=grid)
    federate(f"{settings_of('leave')} rounds=1 forget.schedule={{0:[3]}} run=leave")
    assert equal(federate.state("without"), federate.state("leave"))
    assert not [task for task, client in asked(grid) if client == 3]


def test_negation_turns_the_first_layer_and_trains_on(federate):
    pooled = before(federate)
    found, _ = forgotten(federate, "negate", "unlearn.repair_lr=0.01")
    state = pooled.state()
    state["stem.0.weight"] = -state["stem.0.weight"]
    state = average(pooled, {c: trained(pooled, c, state, 3, lr=0.01) for c in range(3)})
    assert_same(found, pruned(state))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_a_strategy_takes_its_own_settings_and_no_others(name):
    own = strategy_class(name).Settings.model_fields
    assert settings_for(name, {}).model_dump().keys() == own.keys()
    everything = {setting for other in EVERYTHING for setting in strategy_class(other).Settings.model_fields}
    for setting in everything - own.keys():
        with pytest.raises(UserError, match=rf"unlearn\.{setting} is no setting of strategy={name}"):
            settings_for(name, {setting: 1})


def test_every_setting_of_every_strategy_says_what_it_is():
    for name in EVERYTHING:
        for setting, declared in strategy_class(name).Settings.model_fields.items():
            assert declared.description, f"{name}: unlearn.{setting}"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("strategy=subset unlearn.ridges=0.1", "strategy=subset: did you mean unlearn.ridge?"),
        ("strategy=leave unlearn.alpha=2", "unlearn.alpha is no setting of strategy=leave"),
        ("strategy=subset unlearn.freeze_fraction=2", "unlearn.freeze_fraction=2 is not in 0..1"),
        ("strategy=ssd unlearn.tune=sometimes", "unlearn.tune=sometimes is not one of auto, fixed"),
        ("strategy=ssd unlearn.loss_head=client model.client_head=false", "needs model.client_head=true"),
        ("strategy=subsets", "strategy=subsets is not installed: did you mean subset?"),
    ],
)  # fmt: skip
def test_wrong_settings_end_the_run_before_it_begins(federate, words, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        federate(words)
    assert not federate.folder().exists()


# --- strategies of one's own ---------------------------------------------------------------------------------------


def test_a_strategy_of_ones_own_in_one_file_with_settings_and_work_for_clients(federate, renewed):
    grid = LocalGrid(2)
    pooled, initial = before(federate), federate.pooled(SETTINGS).state()
    found, detail = forgotten(federate, "renewed:Renewed", "unlearn.stage=2 unlearn.lr=0.03", grid=grid)
    stage = {name: value for name, value in initial.items() if name.startswith("stages.2.")}
    assert detail["renewed"] == len(stage) > 0
    assert detail["costs"]["train_stage"]["queries"] == 1
    assert federate.run("forgets").config.unlearn == {"stage": 2, "lr": 0.03}
    assert [client for task, client in asked(grid) if task == "train_stage"] == [1, 2, 0]
    state = pooled.state() | stage
    after = average(pooled, {c: trained(pooled, c, state, 2, lr=0.03) for c in range(3)})
    assert_same(found, pruned(state | {name: after[name] for name in stage}))


def test_a_wrong_setting_of_ones_own_strategy_is_named_with_the_nearest(federate, renewed):
    with pytest.raises(UserError, match=r"unlearn\.stages is no setting of strategy=renewed:Renewed: did you mean unl"):
        federate("strategy=renewed:Renewed unlearn.stages=2")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:Strategy", "No module named 'nowhere' (is its folder in PYTHONPATH?)"),
        ("strategies.leave:Nothing", "has no attribute 'Nothing'"),
        ("fedunlearn.runs.ledger:Ledger", "is no subclass of fedunlearn.Strategy"),
        ("test_strategies:Unfinished", "has no method forget(self, federation, forget)"),
        ("broken:Strategy", "SyntaxError"),
    ],
)
def test_what_is_no_strategy_is_refused_with_the_reason(federate, tmp_path, monkeypatch, name, reason):
    (tmp_path / "broken.py").write_text("class Strategy(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)):
        strategy_class(name)
    with pytest.raises(UserError, match=re.escape(reason)):
        federate(f"strategy={name}")


class Unfinished(Strategy):
    """Lacks the method that counts."""


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ({"clients": [3]}, "returned 'clients', which a receipt says by itself"),
        ({"loss": torch.ones(1)}, "Tensor"),
        (None, "returned NoneType, not a dict"),
    ],
)
def test_what_no_receipt_can_hold_ends_the_run_before_the_commit_and_can_be_corrected(
    federate, renewed, monkeypatch, returned, reason
):
    federate.shared(SETTINGS)
    settings = f"{SETTINGS} strategy=renewed:Renewed {FORGETS} fork=before"
    with monkeypatch.context() as patch:
        patch.setattr(strategy_class("renewed:Renewed"), "forget", lambda *_: returned)
        with pytest.raises(UserError, match=reason):
            federate(settings)
    assert federate.requests()[0].state == State.COLLECTING
    federate(settings)
    assert federate.requests()[0].state == State.COMPLETED


class Failing(Strategy):
    """Spoils the model, and fails as many times as it is told to."""

    class Settings(Settings):
        error: str = Field(default="not now", description="what is raised")
        times: int = Field(default=10**6, ge=0, description="how often")

    calls = 0

    @client_task
    @staticmethod
    def ones(client, model, settings):
        """Ones for everything."""
        return Update({name: torch.ones_like(value) for name, value in client.changes(model).items()})

    def forget(self, federation, forget):
        Failing.calls += 1
        federation.apply(federation.run(self.ones, on=federation.retain).mean())
        if Failing.calls <= self.settings.times:
            raise {"not now": NotNowError, "bug": ValueError}[self.settings.error]("the moon is wrong")
        return {"calls": Failing.calls}


@pytest.fixture
def failing():
    Failing.calls = 0
    return "strategy=test_strategies:Failing"


def test_an_error_of_a_strategy_ends_the_run_and_the_model_on_disk_stays_as_it_was(federate, failing):
    federate.shared(SETTINGS)
    settings = f"{SETTINGS} {failing} unlearn.error=bug unlearn.times=1 {FORGETS} fork=before"
    with pytest.raises(ValueError, match="the moon is wrong"):
        federate(settings)
    run = federate.run()
    assert equal(federate.state(), federate.state("before"))
    assert (run.ledger.requests()[0].state, run.ledger.current().finished) == (State.COLLECTING, False)
    federate(settings)
    (request,) = federate.requests()
    assert (request.state, request.detail["calls"], request.detail.get("attempts")) == (State.COMPLETED, 2, None)
    expected = {n: v + 1 if v.is_floating_point() else v for n, v in federate.state("before").items()}
    assert_same(federate.state(), pruned(expected))


def test_what_cannot_be_done_now_is_done_at_the_next_boundary_on_a_model_that_was_not_spoilt(federate, failing, capsys):
    grid = federate(f"rounds=2 {failing} unlearn.times=1 forget.schedule={{1:[3]}}")
    (request,) = federate.requests()
    assert (request.state, request.detail["round"], request.detail["attempts"]) == (State.COMPLETED, 2, 1)
    assert "request r1, attempt 1: the moon is wrong; tried again at the next boundary" in capsys.readouterr().err
    assert [round_ for task, round_ in kinds(grid, client=3) if task == "train"] == [1]
    evaluated, trained_from = (
        [messages.unpack(m) for m in grid.sent_for(task) if messages.task_of(m).round == round_]
        for task, round_ in (("evaluate", 1), ("train", 2))
    )
    assert equal(evaluated[0], trained_from[0])


def test_what_can_never_be_done_is_set_aside_with_the_model_as_it_was(federate, failing, capsys):
    federate.shared(SETTINGS)
    with pytest.raises(UserError, match="request r1 is QUARANTINED; all else of the run is done"):
        federate(f"{SETTINGS} {failing} {FORGETS} fork=before forget.attempts=2")
    (request,) = federate.requests()
    assert (request.state, request.detail["attempts"]) == (State.QUARANTINED, 2)
    assert request.detail["reason"] == "the moon is wrong"
    assert "attempt 2: the moon is wrong; set aside, its clients stay out of training" in capsys.readouterr().err
    assert equal(federate.state(), federate.state("before"))


def test_a_task_of_ones_own_takes_no_built_in_name():
    with pytest.raises(TypeError, match=r"Clashing\.train: a built-in client task has this name"):

        class Clashing(Strategy):
            @client_task
            @staticmethod
            def train(client, model, settings):
                """What another task already does."""


def test_every_task_says_what_a_client_shares():
    for name in EVERYTHING:
        for task in tasks.tasks_of(strategy_class(name)).values():
            assert task.shares.endswith("."), f"{name}: {task.name}"


def test_a_dtype_that_messages_do_not_know_is_refused_where_the_task_is_defined():
    with pytest.raises(ValueError, match="dtype='fp16' of the client task climb is neither 'fp32' nor 'bf16'"):

        @client_task(dtype="fp16")
        def climb(client, model, settings): ...


def test_a_kind_that_flower_does_not_know_is_refused_where_the_task_is_defined():
    with pytest.raises(ValueError, match="kind='training' of the client task climb is none of train, evaluate, query"):

        @client_task(kind="training")
        def climb(client, model, settings): ...


def test_a_task_that_trains_sends_changes_of_the_model(federate, renewed):
    federate("rounds=1 strategy=renewed:Renewed unlearn.stage=3")
    lines = renewed.read_text().replace('kind="train"', 'kind="train", sends=lambda model: {"else": model.pruned}')
    renewed.with_name("other.py").write_text(lines)
    with pytest.raises(UserError, match='task train_stage has kind="train" and sends else, which is no tensor of'):
        federate("rounds=1 run=other strategy=other:Renewed")
    run = federate.run()
    run.request([3], how={"strategy": "other:Renewed", "unlearn": {"stage": 3, "lr": 0.01}})
    run.ledger.close()
    with pytest.raises(UserError, match="r1 is REFUSED"):
        federate("rounds=1 strategy=renewed:Renewed unlearn.stage=3")
    assert federate.requests()[0].detail["reason"].startswith("the client task train_stage has kind=")
