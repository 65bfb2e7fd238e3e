"""Runs that are stopped, killed or finished, and started again."""

import pytest

from fedunlearn import forget
from fedunlearn.errors import UserError
from fedunlearn.federation import messages as wire
from fedunlearn.runs.ledger import State
from local_grid import LocalGrid, equal, kinds

SCHEDULE = "rounds=3 train.server_momentum=0.5 forget.schedule={2:[3]}"


def crash_at(grid, number):
    def deliver(message):
        if len(grid.sent) == number:
            raise KeyboardInterrupt
        return grid.call(message)

    grid.deliver = deliver
    return grid


@pytest.mark.parametrize(("strategy", "every"), [("strategy=ssd", 2), ("strategy=subset unlearn.rounds=1", 5)])
def test_a_run_that_is_stopped_at_any_message_goes_on_to_the_same_weights(
    federate, strategy, every, known, monkeypatch
):
    undisturbed = federate(f"{SCHEDULE} {strategy} run=whole")
    expected = federate.state("whole")
    for number in range(3, len(undisturbed.sent) + 1, every):
        name = f"stopped-{number}"
        with pytest.raises(KeyboardInterrupt):
            federate(f"{SCHEDULE} {strategy} run={name}", grid=crash_at(LocalGrid(2), number))
        federate(f"{strategy} run={name}")
        assert equal(federate.state(name), expected), f"stopped at message {number}"


def test_a_request_that_came_in_a_round_that_is_repeated_still_waits_for_its_end(federate):
    def asking(grid, run, stop):
        def deliver(message):
            task = wire.task_of(message)
            if (message.metadata.message_type, task.round) == ("train", 2):
                if not federate.requests(run):
                    assert forget.main(["--client", "3", "--run", run]) == 0
                elif stop:
                    raise KeyboardInterrupt
            return grid.call(message)

        grid.deliver = deliver
        return grid

    federate("run=whole", grid=asking(LocalGrid(2), "whole", stop=False))
    with pytest.raises(KeyboardInterrupt):
        federate("run=stopped", grid=asking(LocalGrid(2), "stopped", stop=True))
    federate("run=stopped")
    assert federate.requests("stopped")[0].detail["round"] == 2
    assert equal(federate.state("stopped"), federate.state("whole"))


def test_who_asked_in_a_round_that_is_not_repeated_trains_no_more(federate):
    federate("unlearn.recovery_rounds=2")
    ledger = federate.run().ledger
    ledger.file([3], not_before=4)
    ledger.close()
    grid = federate()
    assert [kind for kind in kinds(grid) if kind[0] == "train"] == [("train", 4)] * 2 + [("train", 5)] * 2
    assert not [kind for kind in kinds(grid, client=3) if kind[0] == "train"]
    (request,) = federate.requests()
    assert (request.detail["round"], request.detail["completed_round"]) == (3, 5)


def test_a_request_that_recovers_ends_with_the_runs_rounds_also_when_it_was_stopped(federate):
    settings = "rounds=4 forget.schedule={3:[2]} unlearn.recovery_rounds=5"
    grid = LocalGrid(2)

    def deliver(message):
        if (message.metadata.message_type, wire.task_of(message).round) == ("train", 4):
            raise KeyboardInterrupt
        return grid.call(message)

    grid.deliver = deliver
    with pytest.raises(KeyboardInterrupt):
        federate(settings, grid=grid)
    federate(settings)
    (request,) = federate.requests()
    assert (federate.run().ledger.head().round, request.detail["completed_round"]) == (4, 4)


def test_settings_given_as_a_mapping_must_agree_too(federate):
    federate("rounds=1")
    with pytest.raises(UserError, match=r"train\.lr="):
        federate("rounds=1 train={lr:0.123}")


def test_while_a_finished_run_goes_on_it_takes_requests(federate):
    federate("rounds=1")
    assert federate.run().ledger.head().finished
    federate.run().ledger.file([3])
    grid, finished = LocalGrid(2), []

    def deliver(message):
        finished.append(federate.run().ledger.head().finished)
        return grid.call(message)

    grid.deliver = deliver
    federate("rounds=1", grid=grid)
    assert finished
    assert not any(finished)


def test_what_a_crash_left_beside_the_checkpoint_is_deleted_and_the_timeout_may_change(federate):
    federate("rounds=1")
    for name in ("round-00000.safetensors", ".new-half-written"):
        (federate.folder() / "checkpoints" / name).write_bytes(b"of a model that knew the client")
    federate("rounds=1 timeout=7200")
    assert [file.name for file in (federate.folder() / "checkpoints").iterdir()] == ["round-00001.safetensors"]


@pytest.mark.parametrize(
    "where", ["fedunlearn.runs.checkpoint.save", "fedunlearn.runs.ledger.Ledger.commit", "os.fsync"]
)
@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_run_that_is_stopped_while_committing_applies_the_request_once(federate, monkeypatch, where, number):
    federate(f"{SCHEDULE} run=whole")
    calls = []
    with monkeypatch.context() as patch:
        module, name = where.rsplit(".", 1)
        original = _resolve(module, name)

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(where, stopping)
        with pytest.raises(KeyboardInterrupt):
            federate(SCHEDULE)
    federate("run=test")
    assert equal(federate.state(), federate.state("whole"))
    run = federate.run()
    applied = [e for e in run.ledger.events() if e.get("state") == State.APPLIED]
    assert len(applied) == 1
    assert run.ledger.verify()
    assert [row["round"] for row in run.metrics() if row["kind"] == "round"] == [1, 2, 3]


def _resolve(module, name):
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        parent, cls = module.rsplit(".", 1)
        return getattr(_resolve(parent, cls), name)


def test_a_finished_run_is_left_as_it_is(federate, capsys):
    federate()
    before = federate.state()
    grid = federate("run=test")
    assert equal(federate.state(), before)
    assert "train" not in [kind for kind, _ in kinds(grid)]
    assert "report:" in capsys.readouterr().out


def test_a_run_keeps_its_settings_its_data_and_its_holder(federate):
    from fedunlearn.runs.run import hold

    federate("seed=1")
    with pytest.raises(UserError, match="run test has seed=1, not 2: use another run name"):
        federate("seed=2")
    with hold(federate.folder()), pytest.raises(UserError, match="run test is held by process"):
        federate("seed=1")
    about = federate.folder() / "run.json"
    about.write_text(about.read_text().replace('"data": "', '"data": "0'))
    with pytest.raises(UserError, match="was trained on other data"):
        federate("seed=1")


def test_a_damaged_checkpoint_is_named(federate):
    federate("rounds=2")
    (file,) = (federate.folder() / "checkpoints").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"round-00002.safetensors was cut short or changed"):
        federate("rounds=2")
