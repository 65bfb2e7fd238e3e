"""What is sent to experiment trackers, under which names; that they end no run; each real one where it is there."""

import importlib
import json
import logging

import pytest

from fedunlearn.apps import track
from fedunlearn.config import Config
from fedunlearn.data.selection import Portion, Selection
from fedunlearn.errors import UserError

TINY = "model.width=8 train.client_head_steps=5 data.limit=60 clients=3"
SCORE = {"class": 0.5, "client_id": 0.25, "examples": 4}


class Kept:
    """A tracker that keeps what it is sent."""

    def __init__(self, run, settings):
        self.settings, self.sent, self.texts, self.pictures, self.closed = settings, [], {}, [], 0
        KEPT.append(self)

    def numbers(self, values, step):
        self.sent += [(name, step, value) for name, value in values.items()]

    def words(self, name, text, step):
        self.texts.setdefault(name, []).append((step, text))

    def picture(self, name, figure, step):
        self.pictures.append((name, step))

    def close(self):
        self.closed += 1

    def steps(self, name):
        return [step for sent, step, _ in self.sent if sent == name]


KEPT: list[Kept] = []


@pytest.fixture
def kept_by(monkeypatch):
    KEPT.clear()
    monkeypatch.setitem(track.TRACKERS, "tensorboard", Kept)
    monkeypatch.setattr(track, "find_spec", lambda name: True)
    monkeypatch.setattr(track, "accuracy_figure", lambda *about: None)
    return KEPT


def test_rounds_and_requests_are_sent_with_their_rounds_as_steps(federate, kept_by):
    federate(f"{TINY} rounds=2 track=tensorboard forget.schedule={{1:[2]}}")
    (kept,) = kept_by
    rows = [row for row in federate.run().metrics() if row["kind"] == "round"]
    for name, value in {
        "train/loss": lambda row: row["loss"],
        "test/accuracy": lambda row: row["test"]["class"],
        "retain/accuracy": lambda row: row["retain"]["class"],
    }.items():
        assert [sent for sent in kept.sent if sent[0] == name] == [(name, row["round"], value(row)) for row in rows]
    assert kept.steps("forget/client_2/accuracy") == [2]
    (request,) = federate.requests()
    for name in ("seconds", "megabytes", "client_seconds", "before/test/accuracy", "after/client_2/accuracy"):
        assert kept.steps(f"forget/r1/{name}") == [1], name
    assert kept.texts["forget/r1/state"][-1] == (1, "COMPLETED: clients 2, strategy ssd")
    assert kept.steps("forget/open_requests")[-1] == 2
    assert kept.pictures == [("report/accuracy", 2)]
    assert kept.closed == 1
    assert request.state == "COMPLETED"


def test_whoever_is_given_more_rounds_goes_on_at_the_same_tracker(federate, kept_by):
    federate(f"{TINY} rounds=1 track=tensorboard")
    federate(f"{TINY} rounds=2")  # which keeps the tracker that it began with
    federate(f"{TINY} rounds=3 track=none")
    assert [kept.steps("train/loss") for kept in kept_by] == [[1], [2]]


class Broken(Kept):
    def numbers(self, values, step):
        raise ConnectionError("no route to the tracker")


class Absent:
    def __init__(self, run, settings):
        raise OSError("no such server")


@pytest.mark.parametrize(("tracker", "reason"), [(Broken, "no route to the tracker"), (Absent, "no such server")])
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(federate, kept_by, monkeypatch, caplog, tracker, reason):
    monkeypatch.setitem(track.TRACKERS, "tensorboard", tracker)
    monkeypatch.setattr(logging.getLogger("fedunlearn"), "propagate", True)
    federate(f"{TINY} rounds=1 track=tensorboard forget.schedule={{1:[2]}}")
    said = [record.getMessage() for record in caplog.records if "track=" in record.getMessage()]
    assert said == [f"track=tensorboard has failed, nothing more is sent: {reason}"]
    assert federate.run().ledger.current().round == 1
    assert federate.requests()[0].state == "COMPLETED"


@pytest.mark.parametrize("name", track.PACKAGES)
def test_a_package_that_is_missing_is_named_with_how_to_get_it_before_anything_begins(federate, name, monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"track={name} needs .*: pip install 'fedunlearn\[{name}\]'"):
        federate(f"{TINY} rounds=1 track={name}")
    assert not federate.folder().exists()


def test_the_names_of_a_rounds_numbers_by_hand():
    own = SCORE | {"class": 0.75, "held_out": 0.5}
    row = {
        "kind": "round", "round": 3, "loss": 2.5, "class_accuracy": 0.5, "client_accuracy": float("nan"),
        "seconds": 1.5, "test": SCORE, "retain": SCORE, "forgotten": {"3": own}, "retain_clients": {"1": SCORE},
    }  # fmt: skip
    assert track.numbers_of(row) == {
        "train/loss": 2.5, "train/accuracy": 0.5, "time/round_seconds": 1.5, "test/accuracy": 0.5,
        "retain/accuracy": 0.5, "retain/client_accuracy": 0.25, "forget/client_3/accuracy": 0.75,
        "forget/client_3/memorisation_gap": 0.25,
    }  # fmt: skip
    cost = {"bytes": 2_000_000, "work": 0.5}
    row = {
        "kind": "forget", "request": "r1", "round": 3, "completed_round": 4, "seconds": 2.0, "gate": {"passed": True},
        "costs": {"fisher": cost, "relabel": cost}, "before": {"test": SCORE}, "after": {"test": SCORE},
    }  # fmt: skip
    assert track.numbers_of(row) == {
        "forget/r1/seconds": 2.0, "forget/r1/megabytes": 4.0, "forget/r1/client_seconds": 1.0,
        "forget/r1/gate_passed": 1.0, "forget/r1/before/test/accuracy": 0.5, "forget/r1/after/test/accuracy": 0.5,
    }  # fmt: skip
    portion = {4: Portion(4, 1, Selection((5,)))}
    row = {"kind": "round", "round": 3, "test": SCORE, "forgotten": {"3": SCORE, "4": SCORE}}
    assert track.numbers_of(row, portion) == {
        "test/accuracy": 0.5, "forget/client_3/accuracy": 0.5, "forget/client_1_part_4/accuracy": 0.5,
    }  # fmt: skip
    assert track.numbers_of({"kind": "purge", "round": 3}) == {}
    assert track.numbers_of({"kind": "round", "round": 3}) == {}


def test_no_place_of_files_no_key_and_nobody_who_asks_is_sent(federate, kept_by):
    names = {"file": "/secret", "names": ["secret hospital"]}
    config = Config(home="/secret", partition=names, forget={"keys": {1: "ab" * 32}}, track="wandb")
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": "/secret"})})
    settings = track.hyperparameters(config)
    assert settings["train.lr"] == 0.05
    assert not {"home", "data.root", "forget.keys"} & settings.keys()
    assert "secret" not in json.dumps(settings)
    federate(f"{TINY} rounds=1 track=tensorboard")
    federate.run().request([2], by="Ada Byron", right="Art. 17")
    federate(f"{TINY} rounds=2")
    sent = json.dumps([KEPT[-1].texts, KEPT[-1].settings, KEPT[-1].sent])
    assert "forget/r1/state" in sent
    assert "Ada" not in sent
    assert "Art. 17" not in sent
    assert str(federate.home) not in sent


# --- the real ones, where they are installed ----------------------------------------------------------------------


def in_two_parts(federate, name):
    """A run that was resumed, with a request; the picture is drawn for real."""
    federate(f"{TINY} rounds=1 track={name} forget.schedule={{1:[2]}}")
    federate(f"{TINY} rounds=2 forget.schedule={{1:[2]}}")
    return [row["loss"] for row in federate.run().metrics() if row["kind"] == "round"]


def test_tensorboard(federate):
    pytest.importorskip("tensorboard")
    loss = in_two_parts(federate, "tensorboard")
    (folder,) = (federate.home / "tensorboard").iterdir()
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder)).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in found.Scalars("train/loss")] == [
        (1, loss[0]),
        (2, loss[1]),
    ]
    assert {"test/accuracy", "forget/r1/seconds"} <= set(found.Tags()["scalars"])
    assert "report/accuracy" in found.Tags()["images"]


@pytest.mark.filterwarnings("default")  # SQLAlchemy's, about MLflow's own tables, would be errors
def test_mlflow(federate, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    loss = in_two_parts(federate, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{federate.home}/mlflow/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "fedunlearn"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        (1, loss[0]),
        (2, loss[1]),
    ]
    assert (run.info.status, run.info.run_name, run.data.params["rounds"]) == ("FINISHED", "test", "1")
    assert run.data.tags["forget/r1/state"].startswith("COMPLETED")
    assert [file.path for file in client.list_artifacts(run.info.run_id, "report")] == ["report/accuracy.png"]


def test_wandb_offline(federate, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    in_two_parts(federate, "wandb")
    key = federate.run().ledger.key[:32]
    parts = list((federate.home / "wandb" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert all(part.name.endswith(f"-{key}") for part in parts)
    for part in parts:
        (file,) = part.glob("*.wandb")
        data = file.read_bytes()
        assert b"train/loss" in data
        assert str(federate.home).encode() not in data
