"""The folder of one run, held by one process at a time."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedunlearn.config import Config, from_json, settings, state_home, to_json
from fedunlearn.errors import UserError
from fedunlearn.runs import checkpoint
from fedunlearn.runs.ledger import Ledger, Request

OPERATIONAL = ("timeout", "window")  # settings that change no result, so that a run may be resumed with others
BESIDE = ("momentum.", "held.", "answers.")  # how names of what is no part of the model begin in a checkpoint
PACKAGES = ("fedunlearn", "flwr", "ray", "torch", "torchvision", "numpy")


class HeldError(UserError):
    """Another process holds the run."""


@dataclass
class Run:
    """An open run: its settings, its ledger, its checkpoints and its metrics."""

    folder: Path
    config: Config
    ledger: Ledger

    @classmethod
    def opened(cls, folder: Path) -> "Run":
        """The run that lies in `folder`, to look at: somebody else may hold it."""
        return cls(folder, stored_config(folder), Ledger(folder / "ledger.sqlite"))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    def commit(
        self,
        model: nn.Module,
        round_: int,
        request: Request | None = None,
        *,
        beside: dict[str, Tensor] | None = None,
        **detail: Any,
    ) -> Request | None:
        """Write the model and what is `beside` it, in one transaction with the request's step to APPLIED.

        Checkpoints that this one replaces are deleted: after a request no model that knew its clients is kept.
        """
        name = f"round-{round_:05d}{f'-{request.id}' if request else ''}.safetensors"
        state = model.state_dict() | (beside or {})
        sha256 = checkpoint.save(self.folder / "checkpoints" / name, state)
        request = self.ledger.commit(round_, name, sha256, request=request, **detail)
        self.delete_all_but(name)
        return request

    def restore(self, model: nn.Module) -> tuple[int, dict[str, Tensor]]:
        """Load the current checkpoint, if there is one, into `model`; returns its rounds, and what is beside it."""
        head = self.ledger.head()
        if head is None:
            return 0, {}
        file = self.folder / "checkpoints" / head.checkpoint
        rest = checkpoint.load(file, model, sha256=head.sha256, beside=BESIDE)
        device = next(model.parameters()).device
        return head.round, {name: value.to(device) for name, value in rest.items()}

    def delete_all_but(self, name: str) -> None:
        """Delete every file beside the checkpoint `name`: older models, and what a crash left half-written."""
        for file in (self.folder / "checkpoints").iterdir():
            if file.name != name:
                file.unlink()

    def record(self, kind: str, **row: Any) -> None:
        """Append a row to `metrics.jsonl`; a row of the same kind, round and request replaces an earlier one."""
        with open(self.folder / "metrics.jsonl", "ab+") as file:
            if file.tell() and not _ends_in_newline(file):
                file.write(b"\n")
            file.write(json.dumps({"kind": kind, **row}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` in order of rounds; lines that a crash cut short are passed over."""
        path = self.folder / "metrics.jsonl"
        rows: dict[tuple, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["kind"], row["round"], row.get("request")] = row
        return sorted(rows.values(), key=lambda row: row["round"])

    def about(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return json.loads((self.folder / "run.json").read_text())


@contextmanager
def open_run(config: Config, *, fingerprint: str, asked: dict[str, Any]) -> Iterator[Run]:
    """Hold the run `config.run`, making it where it is new; its own stored settings count where it is not.

    Args:
        config: the settings of a new run.
        fingerprint: of the data set.
        asked: settings that were named explicitly; a run that exists must agree with them.

    Raises:
        UserError: another process holds the run, it has other settings than `asked`, or other data.
    """
    config = replace(config, run=config.run or f"{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = runs_folder(state_home(config.home)) / config.run
    with hold(folder):
        about = folder / "run.json"
        if not about.exists():
            versions = {package: version(package) for package in PACKAGES}
            content = {"created": datetime.now(UTC).isoformat(), "data": fingerprint, "versions": versions}
            text = json.dumps(content | {"config": json.loads(to_json(config))}, indent=2)
            checkpoint.write_atomically(about, text.encode())
        stored, data = stored_config(folder), json.loads(about.read_text())["data"]
        values = {name: value for name, _, value in settings(stored)}
        for name, value in asked.items():
            if values[name] != value and name not in OPERATIONAL:
                raise UserError(f"run {folder.name} has {name}={values[name]}, not {value}: use another run name")
        if data != fingerprint:
            raise UserError(f"run {folder.name} was trained on other data ({data[:12]}, now {fingerprint[:12]})")
        operational = {name: value for name, value in asked.items() if name in OPERATIONAL}
        ledger = Ledger(folder / "ledger.sqlite")
        try:
            run = Run(folder, replace(stored, home=config.home, **operational), ledger)
            if head := ledger.head():
                run.delete_all_but(head.checkpoint)
            yield run
        finally:
            ledger.close()


def stored_config(folder: Path) -> Config:
    """The settings that a run was started with."""
    return from_json(json.dumps(json.loads((folder / "run.json").read_text())["config"]))


def runs_folder(home: Path) -> Path:
    """Where runs lie in a state folder."""
    return home / "runs"


def all_runs(home: Path) -> list[Path]:
    """The folders of all runs, oldest first."""
    found = [path.parent for path in runs_folder(home).glob("*/run.json")]
    return sorted(found, key=lambda folder: json.loads((folder / "run.json").read_text())["created"])


@contextmanager
def hold(folder: Path, *, patience: float = 0.5) -> Iterator[None]:
    """Hold the folder's lock, which dies with the process; `patience` is in seconds.

    Raises:
        HeldError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        if not _lock(file, fcntl.LOCK_EX, patience=patience):
            raise HeldError(f"run {folder.name} is held by process {holder(folder)}: wait for it, or end it")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_live(folder: Path) -> bool:
    """Whether a process holds the run."""
    with open(folder / "lock", "a+") as file:
        return not _lock(file, fcntl.LOCK_SH)


def holder(folder: Path) -> str:
    """The process id that was written when the run was last taken hold of."""
    return (folder / "lock").read_text()


def _lock(file: Any, kind: int, *, patience: float = 0.5) -> bool:
    """Whether the lock was got; `patience` (seconds) outlasts somebody who only looks whether the run is live."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
