"""FedEraser: calibrated replay of stored updates (Liu et al., IWQoS 2021, "FedEraser: Enabling Efficient Client-Level
Data Removal from Federated Learning Models")."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor

from fedunlearn.federation import messages as wire
from fedunlearn.federation.nodes import Answer
from fedunlearn.federation.requests import Forgetting
from fedunlearn.runs import checkpoint
from fedunlearn.runs.run import Run

FOLDER = "updates"


class FedEraser(Forgetting):
    """U'_c = |U_c| / |V_c| V_c: stored updates keep their length, and get the direction of calibrating ones (Eq. 2-3).

    Every `unlearn.every` rounds each client's own update U_c is stored. A request replays these rounds from the initial
    model: every retained client trains on the share `unlearn.calibration` of its images from the replayed model, V_c is
    how it moved, U'_c replaces U_c in the store, and the replayed model moves by the mean of U'_c over examples (with
    the server's momentum). BatchNorm statistics are those of the calibration. Stored updates of clients that left are
    deleted with the request.
    """

    reads = ("every", "calibration")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Every client answers for itself."""
        self.apart = (self.round + 1) % self.config.unlearn.every == 0
        return super().configure_train(server_round, arrays, config, grid)

    def seen(self, answer: Answer) -> None:
        """Store a client's update."""
        if self.apart:
            (client,) = answer.counts
            examples = self.federation.examples[client]
            update = {name: total / examples for name, total in answer.sums.items()}
            checkpoint.save(stored(self.run, self.round, client), update)

    def forget(self, leaving: list[int], grid: Grid, costs: dict[str, Any]) -> dict[str, Any]:
        """Replay."""
        retained: dict[int, list[int]] = {}
        for round_, client in updates(self.run):
            if client in self.active and round_ <= self.round:  # later ones are of a round that is repeated
                retained.setdefault(round_, []).append(client)
        self.server.begin_anew(leaving)
        for round_, active in retained.items():
            self.log(f"── replaying round {round_} of {max(retained)}")
            calibrating: dict[int, dict[str, Tensor]] = {}

            def calibrate(answer: Answer, found: dict[int, dict[str, Tensor]] = calibrating) -> None:
                (client,) = answer.counts
                found[client] = {n: total / self.federation.examples[client] for n, total in answer.sums.items()}

            share = self.config.unlearn.calibration
            how = {"round_": round_, "apart": True, "share": share, "each": calibrate}
            answer = self.ask_to_train("train", grid, active, costs, "replay", **how)
            self.server.advance(self._calibrated(round_, calibrating), round_)
            self.server.train_head(answer.moments, round_)
        for round_, client in updates(self.run):
            if client in leaving:
                stored(self.run, round_, client).unlink()
        for torn in (self.run.folder / FOLDER).glob(f"{checkpoint.NEW}*"):
            torn.unlink()  # whoever was killed while storing an update left it, and it may be a leaving client's
        return {"replayed": len(retained)}

    def stored_bytes(self) -> int:
        """The stored updates too."""
        return super().stored_bytes() + sum(stored(self.run, *update).stat().st_size for update in updates(self.run))

    def _calibrated(self, round_: int, calibrating: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The mean over examples of U'_c, which is stored in U_c's place."""
        params = [name for name, _ in self.model.named_parameters()]
        sums: dict[str, Tensor] = {}
        total = sum(self.federation.examples[c] for c in calibrating)
        for client, direction in calibrating.items():
            path = stored(self.run, round_, client)
            update, _ = checkpoint.read_tensors(path)
            calibrated = direction | {name: along(update[name], direction[name]) for name in params}
            checkpoint.save(path, calibrated)
            wire.add_to(sums, calibrated, self.federation.examples[client] / total)
        return sums


def along(update: Tensor, direction: Tensor) -> Tensor:
    """|U| / |V| V, layer by layer; nothing where V is nothing."""
    length = torch.linalg.vector_norm(direction)
    return direction * (torch.linalg.vector_norm(update) / length) if length else direction


def stored(run: Run, round_: int, client: int) -> Path:
    """Where a client's update of a round lies."""
    return run.folder / FOLDER / f"round-{round_:05d}-client-{client}.safetensors"


def updates(run: Run) -> list[tuple[int, int]]:
    """(round, client) of every stored update, in order."""
    names = (re.fullmatch(r"round-(\d+)-client-(\d+)\.safetensors", f.name) for f in (run.folder / FOLDER).glob("*"))
    return sorted((int(name[1]), int(name[2])) for name in names if name)
