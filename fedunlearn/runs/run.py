"""One run: its folder with settings, ledger, checkpoints and metrics, and the door for requests from outside."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedunlearn.config import Config, check_clients, stored
from fedunlearn.errors import UserError
from fedunlearn.runs.door import RequestHandle
from fedunlearn.runs.ledger import Ledger, Request
from fedunlearn.runs.lock import is_locked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedunlearn.nn.model import TwoHeadResNet18

# what reads or writes tensors imports torch when it is called: a look at the ledger must not wait for it


@dataclass
class Run:
    """A run's folder.

    Attributes:
        folder: where everything lies.
        config: the settings it was started with.
        ledger: its requests, its current checkpoint, its audit chain.

    Example:
        >>> import fedunlearn
        >>> run = fedunlearn.open_run("demo")  # doctest: +SKIP
        >>> run.metrics()[-1]["test"]["class"]  # doctest: +SKIP
        0.95
    """

    folder: Path
    config: Config
    ledger: Ledger

    @classmethod
    def opened(cls, folder: Path) -> "Run":
        """Open the run in `folder` to look at it and to ask for something; another process may hold it."""
        return cls(folder, stored_config(folder), Ledger(folder / "ledger.sqlite"))

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    # For whoever asks from outside -------------------------------------------------------------------------------

    def is_live(self) -> bool:
        """Say whether a process holds the run."""
        return is_locked(self.folder)

    def request(self, clients: Iterable[int]) -> RequestHandle:
        """Ask for clients to be forgotten, together.

        A live run takes the request at its next round boundary. Otherwise nobody does, until somebody serves the run.

        Returns:
            A handle on the new request and on earlier ones that cover some of the clients.

        Raises:
            UserError: a client is not in 0..C-1, or the run has no sound checkpoint to forget from.
        """
        wanted = list(clients)
        check_clients(wanted, self.config.clients)
        live, current = self.is_live(), self.ledger.current()
        if not live:
            self.check_checkpoint()
        requests = self.ledger.file(wanted, not_before=current.round + 1 if live and current else 0)
        return RequestHandle(self.folder, self.ledger, tuple(request.id for request in requests))

    def check_checkpoint(self) -> None:
        """Raise UserError unless there is a sound checkpoint."""
        from fedunlearn.runs import checkpoint

        current = self.ledger.current()
        if current is None:
            raise UserError(f"run {self.name} has no checkpoint yet: start it again with run={self.name}")
        checkpoint.read(self.folder / "checkpoints" / current.checkpoint, sha256=current.sha256)

    def model(self) -> "TwoHeadResNet18":
        """Load the current model, in eval mode on the CPU.

        Raises:
            UserError: there is no checkpoint, or it was damaged.
        """
        from fedunlearn.build import model_of, open_dataset

        self.check_checkpoint()
        model = model_of(self.config, open_dataset(self.config))
        self.restore(model, beside=None)
        return model.eval()

    # For the process that holds it -------------------------------------------------------------------------------

    def commit(
        self, tensors: "dict[str, Tensor]", round_: int, request: Request | None = None, **detail: Any
    ) -> Request | None:
        """Write the server's state, in one transaction with the request's step to APPLIED.

        Checkpoints that this one replaces are deleted: after a request no model that knew its clients is kept.
        """
        from fedunlearn.runs import checkpoint

        name = f"round-{round_:05d}{f'-{request.id}' if request else ''}.safetensors"
        sha256 = checkpoint.save(self.folder / "checkpoints" / name, tensors)
        applied = self.ledger.commit(round_, name, sha256, request=request, **detail)
        self.delete_all_but(name)
        return applied

    def restore(self, model: "nn.Module", *, beside: tuple[str, ...] | None) -> "tuple[int, dict[str, Tensor]]":
        """Load the current checkpoint into `model`; where there is none yet, `model` stays as it is.

        Args:
            model: says which tensors a checkpoint must have, and where they are to be.
            beside: how names of further tensors begin; None for any.

        Returns:
            The rounds that are in it, and all its tensors.

        Raises:
            UserError: it was damaged, or is of another model.
        """
        from fedunlearn.runs import checkpoint

        current = self.ledger.current()
        rest: dict[str, Tensor] = {}
        if current is not None:
            file = self.folder / "checkpoints" / current.checkpoint
            rest = checkpoint.load(file, model, sha256=current.sha256, beside=beside)
        device = next(model.parameters()).device
        params = {name: value.clone() for name, value in model.state_dict().items()}
        return current.round if current else 0, params | {name: value.to(device) for name, value in rest.items()}

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
        """Read the rows of `metrics.jsonl` in order of rounds; lines that a crash cut short are passed over."""
        path = self.folder / "metrics.jsonl"
        rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows[row["kind"], row["round"], row.get("request")] = row
        return sorted(rows.values(), key=lambda row: row["round"])

    def about(self) -> dict[str, Any]:
        """Read `run.json`: when it was made, of which data, with which versions and settings."""
        return read_about(self.folder)


def read_about(folder: Path) -> dict[str, Any]:
    """Read the `run.json` of a run's folder."""
    return json.loads((folder / "run.json").read_text())


def stored_config(folder: Path) -> Config:
    """Read the settings that a run was started with."""
    return stored(read_about(folder)["config"])


def _ends_in_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
