"""Sends what a run measures to an experiment tracker too: TensorBoard, MLflow or Weights & Biases (`track`).

A run is one run of the tracker, also after it was resumed: its ledger's key is its identity there. What is sent has no
names, reasons or signatures of whoever asks, no places of files, no images and no weights.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from logging import getLogger
from math import isfinite
from typing import Any, Protocol

from PIL import Image

from fedunlearn.config import Config, values_of
from fedunlearn.data.selection import Portion
from fedunlearn.errors import UserError
from fedunlearn.runs.figures import accuracy_figure, curves
from fedunlearn.runs.ledger import OPEN, Request
from fedunlearn.runs.report import marks
from fedunlearn.runs.rows import FORGET, ROUND
from fedunlearn.runs.run import Run

PROJECT = "fedunlearn"
PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}  # that `track` needs to be there
NOT_SENT = ("home", "data.root", "partition.file", "partition.names", "partition.keys", "forget.keys", "track")

log = getLogger("fedunlearn")


class Tracker(Protocol):
    """What a tracker has to be able to do; steps are rounds."""

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""
        ...

    def words(self, name: str, text: str, step: int) -> None:
        """Send a text, which replaces an earlier one of that name."""
        ...

    def picture(self, name: str, figure: Any, step: int) -> None:
        """Send a figure of matplotlib."""
        ...

    def close(self) -> None:
        """Send what is still to be sent."""
        ...


def check_tracker(config: Config) -> None:
    """Raise UserError where the package of the chosen tracker is missing."""
    package = PACKAGES.get(config.track)
    if package and find_spec(package) is None:
        raise UserError(
            f"track={config.track} needs a package that is not installed: pip install 'fedunlearn[{config.track}]'"
        )


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Send every row that the run records to its tracker, and its requests; a tracker that fails ends nothing."""
    if run.config.track == "none":
        yield
        return
    sending = Sending(run, TRACKERS[run.config.track])
    run.listeners.append(sending.row)
    try:
        yield
    finally:
        run.listeners.remove(sending.row)
        sending.close()


class Sending:
    """Sends a run's rows and requests to a tracker until that fails, which is said once.

    Args:
        run: that is held.
        begin: opens the run at the tracker.
    """

    def __init__(self, run: Run, begin: Callable[[Run, dict[str, Any]], Tracker]) -> None:
        self._run, self._states = run, dict[str, str]()
        self._tracker: Tracker | None = None
        with self._forgiven():
            self._tracker = begin(run, hyperparameters(run.config))

    def row(self, row: Mapping[str, Any]) -> None:
        """Send what a row has."""
        with self._forgiven():
            if self._tracker:
                if values := numbers_of(row, self._run.ledger.portions()):
                    self._tracker.numbers(values, row.get("completed_round", row["round"]))
                self._requests(self._tracker)

    def close(self) -> None:
        """Send how requests stand, and the curves."""
        with self._forgiven():
            if self._tracker:
                self._requests(self._tracker)
                self._curves(self._tracker)
                self._tracker.close()

    def _requests(self, tracker: Tracker) -> None:
        """Send the requests whose state has changed."""
        requests = self._run.ledger.requests()
        for request in requests:
            if self._states.get(request.id) != request.state:
                self._states[request.id] = request.state
                tracker.words(f"forget/{request.id}/state", in_words(request), self._round())
        if requests:
            open_ = sum(request.state in OPEN for request in requests)
            tracker.numbers({"forget/open_requests": float(open_)}, self._round())

    def _curves(self, tracker: Tracker) -> None:
        rows, ledger = self._run.metrics(), self._run.ledger
        if curves(rows, "class"):
            figure = accuracy_figure(rows, marks(ledger.requests(), ledger.events()))
            tracker.picture("report/accuracy", figure, self._round())

    def _round(self) -> int:
        current = self._run.ledger.current()
        return current.round if current else 0

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """Let the run go on whatever a tracker raises; nothing more is sent."""
        try:
            yield
        except Exception as error:
            log.warning("track=%s has failed, nothing more is sent: %s", self._run.config.track, error)
            self._tracker = None


def numbers_of(row: Mapping[str, Any], portions: Mapping[int, Portion] | None = None) -> dict[str, float]:
    """Give the numbers of a row of `metrics.jsonl` under the names that they have at a tracker.

    Args:
        row: that was recorded.
        portions: of clients that requests were about, by number.

    Example:
        >>> numbers_of({"kind": "round", "round": 3, "loss": 0.5, "test": {"class": 0.9, "client_id": 0.0}})
        {'train/loss': 0.5, 'test/accuracy': 0.9}
    """
    if row["kind"] == ROUND:
        names = {"loss": "train/loss", "class_accuracy": "train/accuracy", "client_accuracy": "train/client_accuracy"}
        found = {name: row[key] for key, name in (names | {"seconds": "time/round_seconds"}).items() if key in row}
        if "test" in row:
            found |= accuracies(row, "", portions or {})
    elif row["kind"] == FORGET:
        found = costs_of(row)
        for when in ("before", "after"):
            found |= accuracies(row[when], f"forget/{row['request']}/{when}/", portions or {})
    else:
        return {}
    return {name: float(value) for name, value in found.items() if isfinite(value)}


def accuracies(scores: Mapping[str, Any], prefix: str, portions: Mapping[int, Portion]) -> dict[str, float]:
    """Give the accuracies on held-out, retain and forgotten clients' images.

    Some images of client 1 that a request is about are `client_1_part_12`: which ones is nobody else's business.
    """
    found = {f"{prefix}test/accuracy": scores["test"]["class"]}
    if "retain" in scores:
        found[f"{prefix}retain/accuracy"] = scores["retain"]["class"]
        found[f"{prefix}retain/client_accuracy"] = scores["retain"]["client_id"]
    for client, own in scores.get("forgotten", {}).items():
        portion = portions.get(int(client))
        who = f"client_{portion.client}_part_{client}" if portion else f"client_{client}"
        name = f"{prefix or 'forget/'}{who}"
        found[f"{name}/accuracy"] = own["class"]
        if "held_out" in own:
            found[f"{name}/memorisation_gap"] = own["class"] - own["held_out"]
    return found


def costs_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Give what a request has cost, and whether its model has passed the gate."""
    costs = row["costs"].values()
    found = {"seconds": row["seconds"], "megabytes": sum(cost["bytes"] for cost in costs) / 1e6}
    found |= {"client_seconds": sum(cost["work"] for cost in costs)}
    if "gate" in row:
        found["gate_passed"] = float(row["gate"]["passed"])
    return {f"forget/{row['request']}/{name}": value for name, value in found.items()}


def in_words(request: Request) -> str:
    """Say how a request stands, without who asks and why."""
    clients = ", ".join(map(str, request.owners))
    part = "some images of clients" if request.selection else "clients"  # patients' names are nobody else's business
    return f"{request.state}: {part} {clients}, strategy {request.detail.get('strategy', 'not applied yet')}"


def hyperparameters(config: Config) -> dict[str, Any]:
    """Give the settings that a tracker gets: those that say where files lie or whose keys there are, it does not."""
    values = {name: value for name, value in values_of(config).items() if name not in NOT_SENT}
    simple = (bool, int, float, str)
    return {name: value if isinstance(value, simple) else json.dumps(value) for name, value in values.items()}


class TensorBoard:
    """Event files in the state folder: `tensorboard --logdir ~/.fedunlearn/tensorboard` shows them."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        module: Any = import_module("torch.utils.tensorboard")
        current = run.ledger.current()
        folder = run.home / "tensorboard" / f"{run.name}-{run.ledger.key[:8]}"
        is_new = not folder.exists()
        # what a crash has left of a round that is repeated is not shown
        self._writer = module.SummaryWriter(folder, purge_step=current.round + 1 if current else None)
        if is_new:
            for summary in module.summary.hparams(settings, {"test/accuracy": 0.0}):
                self._writer.file_writer.add_summary(summary)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a signal ends the process at once

    def words(self, name: str, text: str, step: int) -> None:
        """Write a text."""
        self._writer.add_text(name, text, step)
        self._writer.flush()

    def picture(self, name: str, figure: Any, step: int) -> None:
        """Write a figure."""
        self._writer.add_figure(name, figure, step)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run of MLflow's: of the server in $MLFLOW_TRACKING_URI, else in `mlflow/mlflow.db` of the state folder."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        server, folder = os.environ.get("MLFLOW_TRACKING_URI", ""), run.home / "mlflow"
        folder.mkdir(exist_ok=True)
        client = self._client = mlflow.MlflowClient(tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}")
        known, place = client.get_experiment_by_name(PROJECT), None if server else (folder / "files").as_uri()
        experiment = known.experiment_id if known else client.create_experiment(PROJECT, artifact_location=place)
        tag = "fedunlearn.ledger"
        found = client.search_runs([experiment], f"tags.`{tag}` = '{run.ledger.key}'")
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
        else:
            self._id = client.create_run(experiment, run_name=run.name, tags={tag: run.ledger.key}).info.run_id
            params = [self._entities.Param(name, str(value)[:500]) for name, value in settings.items()]
            client.log_batch(self._id, params=params)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers."""
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def words(self, name: str, text: str, step: int) -> None:
        """Send a text, as a tag."""
        self._client.set_tag(self._id, name, text)

    def picture(self, name: str, figure: Any, step: int) -> None:
        """Send a figure, as a file."""
        self._client.log_figure(self._id, figure, f"{name}.png")

    def close(self) -> None:
        """Say that nothing more comes for now."""
        self._client.set_terminated(self._id)


class WeightsAndBiases:
    """A run of Weights & Biases: numbers, settings and figures leave this machine unless WANDB_MODE=offline."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        self._wandb = wandb
        quiet = wandb.Settings(  # nothing of this machine, its code or its terminal is sent
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True,
            x_disable_meta=True, host="not sent",
        )  # fmt: skip
        folder = run.home / "wandb"
        folder.mkdir(exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.ledger.key[:32], name=run.name, resume="allow",
            dir=folder, settings=quiet,
        )  # fmt: skip
        self._run.config.update(settings, allow_val_change=True)
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers."""
        self._run.log({"round": step, **values})

    def words(self, name: str, text: str, step: int) -> None:
        """Send a text, as a part of the summary."""
        self._run.summary[name] = text

    def picture(self, name: str, figure: Any, step: int) -> None:
        """Send a figure."""
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        self._run.log({"round": step, name: self._wandb.Image(Image.open(drawn))})

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Run, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WeightsAndBiases,
}  # fmt: skip
