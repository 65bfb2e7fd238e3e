"""Ask for clients to be forgotten: `python -m fedunlearn.forget --client 3`.

A run that is live takes the request at its next round boundary. Otherwise the newest finished run's checkpoint is
loaded and the request is served here and now, as a short Flower simulation.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from fedunlearn.config import check_clients, state_home
from fedunlearn.errors import UserError
from fedunlearn.runs import checkpoint
from fedunlearn.runs.ledger import OPEN, Ledger, Request, State
from fedunlearn.runs.report import gap
from fedunlearn.runs.run import HeldError, all_runs, is_live, runs_folder, stored_config

POLL_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done or filed, 1 refused or set aside, 2 bad input."""
    options = parser().parse_args(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser("python -m fedunlearn.forget", description="Have clients forgotten by a run's model.")
    p.add_argument("--client", action="append", default=[], help="a client to forget; several make one request")
    p.add_argument("--run", metavar="NAME", help="the run (default: the live one, else the newest finished one)")
    p.add_argument("--wait", action="store_true", help="follow a live run's request to its end")
    p.add_argument("--list", action="store_true", help="list the run's requests")
    p.add_argument("--status", metavar="ID", help="show one request of the run")
    p.add_argument("--json", action="store_true", help="print JSON instead of text")
    p.add_argument("--home", default="", help="state folder (default: $FEDUNLEARN_HOME or ~/.fedunlearn)")
    p.add_argument("--nodes", type=int, default=2, help="without a live run: virtual nodes (default: 2)")
    p.add_argument("--gpus", type=float, default=0.0, help="without a live run: GPU share of a node (default: 0)")
    return p


def run(options: argparse.Namespace) -> int:
    """Do what the options say."""
    folder = find_run(state_home(options.home), options.run)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        if options.list:
            return show(ledger.requests(), options.json)
        if options.status:
            return show([find_request(ledger, options.status, folder.name)], options.json)
        return forget(folder, ledger, options)
    finally:
        ledger.close()


def forget(folder: Path, ledger: Ledger, options: argparse.Namespace) -> int:
    """File the request, and see to it that somebody serves it."""
    count = stored_config(folder).clients
    clients = [whole_number(client, count) for client in options.client]
    check_clients(clients, count)
    check_resources(options)
    live = is_live(folder)
    if not live:
        check_checkpoint(folder, ledger)
    head = ledger.head()
    requests = ledger.file(clients, not_before=head.round + 1 if live and head else 0)
    if any(request.state in OPEN for request in requests):
        if taken_by_live_run(folder, ledger, options):
            if not options.wait:
                tell(options, f"run {folder.name} takes the request at its next round boundary")
                return show(requests, options.json)
            follow(folder, ledger, requests, options)
        else:
            try:
                serve(folder, options)
            except HeldError:  # another command came first, and serves all open requests
                follow(folder, ledger, requests, options)
    return show([ledger.request(request.id) for request in requests], options.json)


def find_run(home: Path, name: str | None) -> Path:
    """The folder of the run `name`; without one, of the newest live run, else of the newest finished one."""
    if name:
        folder = runs_folder(home) / name
        if not (folder / "run.json").exists():
            raise UserError(f"no run {name} in {runs_folder(home)}: there are {names(all_runs(home))}")
        return folder
    newest_first = all_runs(home)[::-1]
    for folder in chain(filter(is_live, newest_first), filter(is_finished, newest_first)):
        return folder
    if newest_first:
        unfinished = names(newest_first)
        raise UserError(f"no run in {runs_folder(home)} is live or finished: name one with --run ({unfinished})")
    raise UserError(f"no run in {runs_folder(home)}: start one with 'flwr run simulations/digits'")


def check_resources(options: argparse.Namespace) -> None:
    """Raise UserError for nodes or GPU shares that no simulation can have."""
    if options.nodes < 1:
        raise UserError(f"--nodes {options.nodes} is too few: a simulation has at least 1")
    if options.gpus:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"--gpus {options.gpus:g}: there is no GPU here, leave it out")


def check_checkpoint(folder: Path, ledger: Ledger) -> None:
    """Raise UserError unless there is a sound checkpoint to forget from."""
    head = ledger.head()
    if head is None:
        raise UserError(f'run {folder.name} has no checkpoint yet: start it again with overrides="run={folder.name}"')
    checkpoint.read(folder / "checkpoints" / head.checkpoint, sha256=head.sha256)


def is_finished(folder: Path) -> bool:
    """Whether all rounds of the run are trained, and this version knows its settings."""
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        head = ledger.head()
    finally:
        ledger.close()
    try:
        return head is not None and head.round >= stored_config(folder).rounds
    except UserError:
        return False


def taken_by_live_run(folder: Path, ledger: Ledger, options: argparse.Namespace) -> bool:
    """Whether a process holds the run and will look at its ledger again; one that will not is waited for."""
    told = False
    while is_live(folder):
        head = ledger.head()
        if head is None or not head.finished:
            return True
        if not told:
            tell(options, f"run {folder.name} is closing: waiting until it lets go")
            told = True
        time.sleep(POLL_SECONDS)
    return False


def follow(folder: Path, ledger: Ledger, requests: list[Request], options: argparse.Namespace) -> None:
    """Print every change of state until none of the requests is open."""
    seen: dict[str, State] = {}
    while True:
        live = is_live(folder)
        current = [ledger.request(request.id) for request in requests]
        for request in current:
            if seen.get(request.id) != request.state:
                seen[request.id] = request.state
                tell(options, f"request {request.id}: {request.state}")
        if not any(request.state in OPEN for request in current):
            return
        if not live:
            raise UserError(
                f"run {folder.name} stopped before the request was served: resume it with "
                f'overrides="run={folder.name}", or repeat this command'
            )
        time.sleep(POLL_SECONDS)


def serve(folder: Path, options: argparse.Namespace) -> None:
    """Serve the run's open requests from its checkpoint, in a Flower simulation of this process."""
    tell(options, f"no live run: run {folder.name} is served here, starting a simulation of {options.nodes} nodes")
    import logging

    from flwr.simulation import run_simulation

    from fedunlearn.apps.client_app import app
    from fedunlearn.apps.server_app import forget_app

    # run_simulation is deprecated in favour of `flwr run`, which needs an app folder and a background SuperLink
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = replace(stored_config(folder), run=folder.name, home=str(folder.parent.parent))
    output = sys.stdout
    sys.stdout = sys.stderr if options.json else sys.stdout
    try:
        run_simulation(
            forget_app(config),
            app,
            num_supernodes=options.nodes,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": options.gpus}},
        )
    finally:
        sys.stdout = output


def find_request(ledger: Ledger, request_id: str, run_name: str) -> Request:
    """The request, or UserError with those that there are."""
    request = ledger.request(request_id)
    if request is None:
        known = ", ".join(r.id for r in ledger.requests()) or "none"
        raise UserError(f"run {run_name} has no request {request_id}: there are {known}")
    return request


def show(requests: list[Request], as_json: bool) -> int:
    """Print requests; 1 if one of them failed."""
    if as_json:
        print(json.dumps([asdict(request) for request in requests], indent=2))
    elif not requests:
        print("no requests")
    for request in [] if as_json else requests:
        print(
            f"{request.id}  {request.state:<11}  clients {names(request.clients)}  {receipt(request.detail)}".rstrip()
        )
    return int(any(request.state in (State.REFUSED, State.QUARANTINED) for request in requests))


def receipt(detail: dict[str, Any]) -> str:
    """What is known of a request, in words."""
    if "after" not in detail:
        return detail.get("reason", "")
    before, after = detail["before"], detail["after"]
    return f"after round {detail['round']}; class accuracy " + ", ".join(
        f"{who} {old['class']:.3f} → {new['class']:.3f}{gaps(old, new)}" for who, old, new in groups(before, after)
    )


def gaps(old: dict[str, Any], new: dict[str, Any]) -> str:
    """A forgotten client's memory gap before and after, in parentheses; nothing for others."""
    return f" (memory gap {gap(old)} → {gap(new)})" if gap(old) else ""


def groups(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, dict, dict]]:
    """(who, scores before, scores after) for the forgotten clients, the others and the test set."""
    forgotten = [(f"client {c}", before["forgotten"][c], after["forgotten"][c]) for c in before["forgotten"]]
    return [*forgotten, *((who, before[who], after[who]) for who in ("others", "test"))]


def whole_number(text: str, count: int) -> int:
    """The client that was typed."""
    try:
        return int(text)
    except ValueError:
        raise UserError(f"client {text!r} is not a whole number in 0..{count - 1}") from None


def names(values: Sequence) -> str:
    """A comma-separated list of folders' names or of numbers."""
    return ", ".join(value.name if isinstance(value, Path) else str(value) for value in values) or "none"


def tell(options: argparse.Namespace, line: str) -> None:
    """Print progress, out of the way of JSON."""
    print(line, file=sys.stderr if options.json else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
