"""FedEraser: calibrated replay of stored updates (Liu et al., IWQoS 2021, "FedEraser: Enabling Efficient Client-Level
Data Removal from Federated Learning Models")."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fedunlearn.config import Settings as CheckedSettings
from fedunlearn.errors import NotNowError
from fedunlearn.federation import messages, tasks
from fedunlearn.federation.handle import Federation, ForgetSet
from fedunlearn.federation.messages import Tensors
from fedunlearn.federation.replies import Results
from fedunlearn.federation.strategy import Strategy
from fedunlearn.runs import checkpoint
from fedunlearn.runs.files import sync
from fedunlearn.runs.ledger import FORGOTTEN
from fedunlearn.runs.run import Run, stored_config

FOLDER, AFTER = "updates", "after-"

log = getLogger("fedunlearn")


class FedEraser(Strategy):
    """U'_c = |U_c| / |V_c| V_c: stored updates keep their length, and get the direction of calibrating ones (Eq. 2-3).

    Every `every` rounds each client's own update U_c is stored. A request replays these rounds from the initial model.
    Every retain client trains on a fraction of its images from the replayed model, and V_c is its update. The replayed
    model moves by the mean of U'_c over examples (with the server's momentum). Once the request is applied, U'_c counts
    in U_c's place.
    Stored updates of forgotten clients are deleted with the request.
    """

    label, colour, marker = "FedEraser", "#7b2cbf", "P"

    class Settings(CheckedSettings):
        """Settings of FedEraser."""

        every: int = Field(default=2, ge=1, le=10**6, description="rounds between stored updates")
        calibration_fraction: float = Field(
            default=0.5, ge=1e-6, le=1, description="of each retain client's images that calibrates its updates"
        )

    def one_reply_each(self, round_: int) -> bool:
        """Have every client answer alone in the rounds whose updates are stored."""
        return round_ % self.settings.every == 0

    def after_reply(self, federation: Federation, run: Run, round_: int, results: Results) -> None:
        """Store a client's update."""
        if self.one_reply_each(round_):
            (client,) = results.counts
            checkpoint.save(stored(place(run.folder, run.ledger.applied()), round_, client), results.mean())

    def after_refusal(self, run: Run, round_: int, results: Results) -> None:
        """Drop a client's update."""
        for client in results.counts:
            stored(place(run.folder, run.ledger.applied()), round_, client).unlink(missing_ok=True)

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Replay the stored rounds with the retain clients, calibrated."""
        here, there = (place(federation.folder, federation.applied + n) for n in (0, 1))
        shutil.rmtree(there, ignore_errors=True)  # of an attempt that failed
        retain = federation.retain
        by_round: dict[int, list[int]] = {}
        for round_, client in updates(here):
            if client in retain:
                by_round.setdefault(round_, []).append(client)
        self.check_complete(federation, by_round)
        federation.begin_anew()
        for round_, clients in by_round.items():
            log.info("── replaying round %d of %d", round_, max(by_round))
            self.replay(federation, round_, clients, here, there)
        return {"replayed": len(by_round)}

    def check_complete(self, federation: Federation, rounds: Iterable[int]) -> None:
        """Raise NotNowError where no round is stored, or not those of the whole run."""
        every, own = self.settings.every, federation.config.strategy
        if (strategies_of(federation.folder) | federation.applied_by) - {own}:
            why = f"strategy={own} has to be chosen from the start, and for every request"
            raise NotNowError(f"updates of some rounds are not stored: {why}")
        if rounds:
            return
        why = f", of any round up to {federation.round} (unlearn.every={every})"
        if federation.round < every:
            why = f" yet: the first are those of round {every} (unlearn.every), and the run is after round "
            why += str(federation.round)
        raise NotNowError(f"no update of a retain client is stored{why}")

    def after_request(self, run: Run) -> None:
        """Delete the updates of forgotten clients, of before the last request, and of a round that was cut short."""
        now, commit = place(run.folder, run.ledger.applied()), run.ledger.current()
        forgotten = run.ledger.clients_in(FORGOTTEN)
        for round_, client in updates(now):
            if client in forgotten or commit is None or round_ > commit.round:
                stored(now, round_, client).unlink()
        for folder in (run.folder / FOLDER).glob(f"{AFTER}*"):
            if folder != now:
                shutil.rmtree(folder)
                sync(run.folder / FOLDER)

    def replay(self, federation: Federation, round_: int, clients: list[int], here: Path, there: Path) -> None:
        """Train for calibration, move by the calibrated updates, and store them in another place."""
        directions: dict[int, Tensors] = {}

        def keep(one: Results) -> None:
            (client,) = one.counts
            directions[client] = one.mean()

        results = federation.run(
            tasks.train,
            on=clients,
            at_round=round_,
            one_client_each=True,
            on_reply=keep,
            fraction=self.settings.calibration_fraction,
        )
        params = [name for name, _ in federation.server.model.named_parameters()]
        sound = {client: directions[client] for client in directions if client in results.counts}
        update = calibrated(federation, round_, sound, params, here, there)
        federation.apply_round(results, update, round_)

    def stored_bytes(self, run: Run) -> int:
        """Count the bytes of the stored updates."""
        here = place(run.folder, run.ledger.applied())
        return sum(stored(here, *update).stat().st_size for update in updates(here))

    def carry_over(self, base: Run, run: Run, round_: int) -> None:
        """Link the base's stored updates of rounds up to `round_`."""
        there, here = place(base.folder, 0), place(run.folder, 0)
        here.mkdir(parents=True, exist_ok=True)
        for stored_round, client in updates(there):
            if stored_round <= round_:
                link = stored(here, stored_round, client)
                link.unlink(missing_ok=True)  # of a copy that was stopped
                os.link(stored(there, stored_round, client), link)


def strategies_of(folder: Path) -> set[str]:
    """Give the strategies that a run was trained under, and before it the runs that it goes on from.

    A study's runs do not say it: what they go on from is theirs to know.
    """
    if not (folder / "run.json").exists():
        return set()
    config = stored_config(folder)
    base = folder.parent / config.fork
    return {config.strategy} | (strategies_of(base) if config.fork and base != folder else set())


def calibrated(
    federation: Federation, round_: int, directions: Mapping[int, Tensors], params: list[str], here: Path, there: Path
) -> Tensors:
    """Give the mean over examples of U'_c, and store each: U_c is here, U'_c there."""
    sums: Tensors = {}
    total = federation.examples(directions)
    for client, direction in directions.items():
        update, _ = checkpoint.read_tensors(stored(here, round_, client))
        new = direction | {name: along(update[name], direction[name]) for name in params}
        checkpoint.save(stored(there, round_, client), new)
        messages.add_to(sums, new, federation.examples([client]) / total)
    return sums


def along(update: Tensor, direction: Tensor) -> Tensor:
    """Give |U| / |V| V of one layer; nothing where V is nothing."""
    length = torch.linalg.vector_norm(direction)
    return direction * (torch.linalg.vector_norm(update) / length) if length else direction


def place(folder: Path, applied: int) -> Path:
    """Say where a run stores updates while so many of its requests are applied.

    A request stores in the next place. The commit that applies it is what makes that place count.
    """
    return folder / FOLDER / f"{AFTER}{applied}"


def stored(folder: Path, round_: int, client: int) -> Path:
    """Say where a client's update of a round lies in a place."""
    return folder / f"round-{round_:05d}-client-{client}.safetensors"


def updates(folder: Path) -> list[tuple[int, int]]:
    """List (round, client) of every update that is stored in a place, in order."""
    names = (re.fullmatch(r"round-(\d+)-client-(\d+)\.safetensors", f.name) for f in folder.glob("*"))
    return sorted((int(name[1]), int(name[2])) for name in names if name)
