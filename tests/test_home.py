"""The runs of a state folder: given more rounds, forked, found."""

import json

import pytest

from conftest import DIGITS, rewrite
from fedunlearn import open_run
from fedunlearn.build import learning_rate_of
from fedunlearn.composing import compose
from fedunlearn.config import from_json
from fedunlearn.errors import UserError
from fedunlearn.federation import messages
from fedunlearn.runs.home import all_runs, find_run, forked, is_finished
from fedunlearn.runs.ledger import State
from fedunlearn.runs.lock import LockedError, lock
from fedunlearn.runs.run import read_about, stored_config
from local_grid import LocalGrid, equal, kinds


@pytest.fixture
def base(federate):
    """The folder of a finished run of three rounds, which has forgotten client 3."""
    federate.shared("forget.schedule={2:[3]}", name="base")
    return federate.folder("base")


def contents(folder):
    """Every file of a run but its lock, which says who had it last."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


def trained(grid):
    return sorted({round_ for task, round_ in kinds(grid) if task == "train"})


# --- more rounds --------------------------------------------------------------------------------------------------


def test_a_finished_run_that_is_given_more_rounds_goes_on_at_the_learning_rate_of_its_end(federate, base):
    end = learning_rate_of(stored_config(base), 3)
    grid = federate("run=base rounds=5")
    assert trained(grid) == [4, 5]
    config = stored_config(base)
    assert (config.rounds, config.train.schedule_rounds) == (5, 3)
    sent = [from_json(messages.task_of(message).config) for message in grid.sent]
    assert {learning_rate_of(config, round_) for config in sent for round_ in (4, 5)} == {end}
    assert [row["round"] for row in federate.run("base").metrics() if row["kind"] == "round"] == [1, 2, 3, 4, 5]
    assert federate.run("base").ledger.current().round == 5
    assert is_finished(base)


def test_more_rounds_are_kept_where_the_run_is_stopped_and_the_horizon_stays_the_first(federate, base):
    grid = LocalGrid(2)

    def deliver(message):
        if kinds(grid)[-1] == ("train", 5):
            raise KeyboardInterrupt
        return grid.call(message)

    grid.deliver = deliver
    with pytest.raises(KeyboardInterrupt):
        federate("run=base rounds=5", grid=grid)
    assert trained(federate("run=base rounds=6")) == [5, 6]
    assert stored_config(base).train.schedule_rounds == 3


def test_a_horizon_of_its_own_is_kept_in_further_rounds(federate, base):
    config = read_about(base)["config"]
    config["train"]["schedule_rounds"] = 2
    rewrite(base, config=config)
    federate("run=base rounds=4")
    assert stored_config(base).train.schedule_rounds == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rounds=2", "run base has rounds=3, not 2: use another run name"),
        ("rounds=5 fraction=0.5", "run base has fraction=1.0, not 0.5: use another run name"),
        ("rounds=5 train.schedule_rounds=5", "run base has train.schedule_rounds=0, not 5"),
        ("rounds=5 unlearn.alpha=3", "run base has unlearn.alpha=2.0, not 3"),
        ("rounds=5 forget.schedule={4:[1]}", r"run base has forget.schedule=\{2: \[3\]\}, not \{4: \[1\]\}"),
    ],
)
def test_fewer_rounds_and_other_settings_are_refused_and_change_nothing(federate, base, words, message):
    before = contents(base)
    with pytest.raises(UserError, match=message):
        federate(f"run=base {words}")
    assert contents(base) == before


def test_more_rounds_of_other_data_are_refused_and_change_nothing(federate, base):
    rewrite(base, data=read_about(base)["data"] | {"1": "of other images", "held-out": "of others too"})
    before = contents(base)
    with pytest.raises(UserError, match=r"run base was trained on other data \(other images of client 1, held-out\)"):
        federate("run=base rounds=5")
    assert contents(base) == before


def test_what_has_become_of_a_forgotten_clients_images_is_no_matter(federate, base):
    rewrite(base, data=read_about(base)["data"] | {"3": "of images that are gone"})
    assert trained(federate("run=base rounds=4")) == [4]
    federate("run=other fork=base")
    assert read_about(federate.folder("other"))["data"] == read_about(base)["data"]


# --- forks --------------------------------------------------------------------------------------------------------


def test_a_fork_goes_on_from_the_base_and_leaves_it_as_it_was(federate, base):
    before = contents(base)
    grid = federate("run=other fork=base strategy=leave rounds=4")
    assert contents(base) == before
    fork, origin = federate.run("other"), federate.run("base")
    assert trained(grid) == [4]
    assert (fork.config.strategy, fork.config.fork, fork.config.unlearn) == ("leave", "base", {})
    same = {"clients", "data", "partition", "model", "loss", "forget"}
    assert fork.config.model_dump(include=same) == origin.config.model_dump(include=same)
    assert fork.config.train.schedule_rounds == 3  # the learning rate stays that of the base's end
    assert learning_rate_of(fork.config, 4) == learning_rate_of(origin.config, 3)
    assert fork.metrics()[: len(origin.metrics())] == origin.metrics()
    assert fork.ledger.requests() == origin.ledger.requests()
    assert fork.ledger.events()[: len(origin.ledger.events())] == origin.ledger.events()
    assert fork.ledger.signed_head().is_signed
    assert fork.ledger.key != origin.ledger.key
    assert fork.ledger.current().round == 4
    assert not [task for task, _ in kinds(grid, client=3) if task == "train"]  # it was forgotten in the base
    assert trained(federate("run=other fork=base strategy=leave rounds=4")) == []  # the same words again resume it


def test_a_fork_without_further_rounds_has_the_bases_model_and_forgets_in_its_own_way(federate, base):
    federate("run=same fork=base")
    assert equal(federate.server_state("same").tensors(), federate.server_state("base").tensors())
    federate("run=negated fork=base strategy=negate forget.schedule={3:[1]}")
    first, second = federate.requests("negated")
    assert (first.clients, second.clients) == ([3], [1])
    assert (second.state, second.detail["round"], second.detail["strategy"]) == (State.COMPLETED, 3, "negate")
    assert not equal(federate.state("negated"), federate.state("base"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.limit=100", "run base has data.limit=120, not 100: a fork goes on from it"),
        ("data.name=random", "run base has data.name=digits, not random"),
        ("clients=5", "run base has clients=4, not 5"),
        ("partition.seed=1", "run base has partition.seed=42, not 1"),
        ("model={width: 16}", "run base has model.width=8, not 16"),
        ("strategy=leave unlearn.alpha=2", "unlearn.alpha is no setting of strategy=leave"),
        ("fork=nothing", "no run nothing in .*: there are base"),
        ("rounds=1", r"forget.schedule: round 2 is not in 0\.\.1"),
    ],
)
def test_a_fork_of_other_data_or_another_model_is_refused(federate, base, words, message):
    before = contents(base)
    with pytest.raises(UserError, match=message):
        federate(f"run=other fork=base {words}")
    assert contents(base) == before
    assert [folder.name for folder in all_runs(federate.home)] == ["base"]


def test_a_fork_of_data_that_have_changed_since_is_refused(federate, base):
    rewrite(base, data=read_about(base)["data"] | {"0": "of other images"})
    with pytest.raises(UserError, match=r"run base was trained on other data \(other images of client 0\)"):
        federate("run=other fork=base")
    assert [folder.name for folder in all_runs(federate.home)] == ["base"]


def test_a_fork_waits_for_nobody(federate, base):
    with lock(base), pytest.raises(LockedError, match="run base is locked by process"):
        federate("run=other fork=base")


def test_a_fork_keeps_the_strategys_settings_unless_it_takes_another_strategy(federate, base):
    def fork(words):
        config = compose(DIGITS, f"fork=base run=other {words}")
        asked = {name: getattr(config, name) for name in ("strategy",) if f"{name}=" in words}
        return forked(config, asked).unlearn

    kept = stored_config(base).unlearn
    assert kept["alpha"] == 2
    assert fork("") == fork("strategy=ssd") == kept
    assert fork("strategy=subset") == {}


# --- which run ----------------------------------------------------------------------------------------------------


def test_the_live_run_comes_first_then_the_newest_finished_one(federate, base):
    for day, name in enumerate(("one", "two", "three"), 1):
        (base.parent / name).mkdir()
        for file in ("run.json", "ledger.sqlite"):
            (base.parent / name / file).write_bytes((base / file).read_bytes())
        rewrite(base.parent / name, created=f"2100-01-0{day}T00:00:00")
    run = federate.run("three")
    run.ledger.commit(0, "round-00000.safetensors", "00")  # as if it had been stopped before its first round
    run.ledger.close()
    assert [folder.name for folder in all_runs(federate.home)] == ["base", "one", "two", "three"]
    assert find_run(federate.home, None).name == open_run().name == "two"
    with lock(federate.folder("one")):
        assert find_run(federate.home, None).name == "one"
    assert find_run(federate.home, "three").name == "three"
    stored = federate.folder("two") / "run.json"
    stored.write_text(stored.read_text().replace('"attempts"', '"of_an_older_version"'))
    assert find_run(federate.home, None).name == "one"


def test_a_run_that_is_not_there_is_named_with_those_that_are(federate, tmp_path):
    with pytest.raises(UserError, match="start one with 'fedunlearn run digits'"):
        open_run()
    federate.shared("forget.schedule={2:[3]}", name="base")
    with pytest.raises(UserError, match=r"no run other in .*: there are base"):
        open_run("other")
    with pytest.raises(UserError, match=r"no run base in .*: there are none"):
        open_run("base", home=str(tmp_path / "elsewhere"))
    run = federate.run("base")
    run.ledger.commit(0, "round-00000.safetensors", "00")
    run.ledger.close()
    with pytest.raises(UserError, match=r"is live or finished: name one with --run \(base\)"):
        open_run()


def test_a_new_run_writes_down_when_it_was_made_of_what_and_with_which_settings(base):
    about = read_about(base)
    assert about.keys() == {"created", "data", "images", "versions", "config"}
    assert {"fedunlearn", "flwr", "torch"} <= about["versions"].keys()
    config = stored_config(base)
    assert config == from_json(json.dumps(about["config"]))
    assert config.unlearn.keys() >= {"tune", "alpha", "loss_head"}  # also those that nobody named
