"""What Flower runs on the server: open a run or resume it, train and forget, report."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.apps.reports import class_counts_of, write_with
from fedunlearn.apps.signals import ends_with_superlink
from fedunlearn.apps.track import check_tracker, tracked
from fedunlearn.build import loss_of
from fedunlearn.composing import compose, spelled_out
from fedunlearn.config import OURS, Config, state_home, values_of, writable_home
from fedunlearn.errors import OneLine, UserError
from fedunlearn.federation.auditor import Auditor, auditor_of
from fedunlearn.federation.rounds import Rounds
from fedunlearn.federation.server_data import check_own_code, known_to_server
from fedunlearn.federation.strategy import check_writable, completed
from fedunlearn.log import set_up
from fedunlearn.runs import purge, receipts, report
from fedunlearn.runs.home import agreed, check_owners, forked, locked_run, runs_folder
from fedunlearn.runs.ledger import Request
from fedunlearn.runs.readmitting import take_back
from fedunlearn.runs.run import Run, open_ledger
from fedunlearn.runs.statement import finite
from fedunlearn.schema import name_of
from fedunlearn.words import split_words

log = getLogger("fedunlearn")


def server_app(conf: Path) -> ServerApp:
    """Make the ServerApp of the Hydra configuration folder `conf`; its run config has one string, `overrides`."""
    from fedunlearn.apps import retrying_actor

    retrying_actor.install()
    set_up()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        logging.getLogger("flwr").addFilter(OneLine())
        words = split_words(str(context.run_config.get("overrides", "")))
        ends_with_superlink("the SuperLink that had started this run has ended, and the run with it: start it again")
        failed = train(grid, compose(conf, words), words)
        if failed:
            raise UserError(f"request {failed[0].id} is {failed[0].state}; all else of the run is done")

    return app


def train(grid: Grid, config: Config, words: list[str]) -> list[Request]:
    """Train the rounds that are missing of a run, forget what is asked, and write the report.

    Args:
        words: what was named explicitly, as `rounds=40`; a run that exists must agree with it.

    Returns:
        Requests that failed.

    Raises:
        UserError: with the way on, where no round could be trained.
    """
    with _locked(config, asked_for(words, config)) as (run, auditor):
        log.info(_scale_line(run.config))
        current = run.ledger.current()
        if current is not None and current.round > 0:
            log.info("run %s goes on after round %d of %d (%s)", run.name, current.round, run.config.rounds, run.folder)
        else:
            log.info("run %s starts (%s)", run.name, run.folder)
        try:
            return carry_out(grid, run, auditor, rounds=run.config.rounds - (current.round if current else 0))
        except UserError as error:
            current = run.ledger.current()
            way_on = f"continue from round {current.round if current else 0} with run={run.name}"
            raise UserError(f"{error}; {way_on}") from error


def serve(grid: Grid, config: Config) -> None:
    """Serve the open requests of an existing run, without any other training."""
    with _locked(config, {}) as (run, auditor):
        carry_out(grid, run, auditor, rounds=0)


def carry_out(grid: Grid, run: Run, auditor: Auditor | None, *, rounds: int) -> list[Request]:
    """Train `rounds` rounds, serve all requests, write the report; gives the requests that failed."""
    before = {request.id for request in run.ledger.unmet()}
    with tracked(run):
        Rounds.assemble(run, auditor=auditor).start(grid, max(0, rounds))
    conclude(run)
    counts = class_counts_of(run, auditor)
    page = write_with(run, counts)
    log.info(report.summary(run, counts))
    log.info("report: %s", page)
    if (folder := run.folder / receipts.FOLDER).exists():
        log.info("receipts: %s (`fedunlearn verify FILE` checks one)", folder)
    failed = run.ledger.unmet()
    for request in failed:
        if request.id not in before:
            log.warning("request %s is %s: %s", request.id, request.state, request.detail.get("reason", ""))
    if old := [request.id for request in failed if request.id in before]:
        log.warning("this run counts as failed, since an earlier request is REFUSED or QUARANTINED: %s", ", ".join(old))
    return failed


def conclude(run: Run) -> None:
    """Remove what is left of clients that were forgotten, and write the receipts that are missing."""
    if run.config.is_for_good:
        purge.purge_due(run)
    receipts.write_all(run, renew=True)


@contextmanager
def _locked(config: Config, asked: dict[str, Any]) -> Iterator[tuple[Run, Auditor | None]]:
    """The run, locked, and the auditor that a simulation has."""
    config = prepared(config, asked)
    if not (runs_folder(state_home(config.home)) / config.run / "run.json").exists():
        take_back(config)
    check_own_code(config)
    auditor = auditor_of(config)
    data, images = (auditor.fingerprints(), auditor.images) if auditor else known_to_server(config)
    with locked_run(config, data=data, images=images, asked=asked) as run:
        if auditor:
            auditor.say_removed()
        yield run, auditor


def prepared(config: Config, asked: dict[str, Any]) -> Config:
    """Give all settings of a run, its stored ones where it exists, after every check that needs no data.

    Raises:
        UserError: the settings asked for are not the run's, or there is no such strategy or loss.
    """
    folder = runs_folder(writable_home(config.home)) / config.run
    if config.run and (folder / "run.json").exists():
        open_ledger(folder).close()  # raises where the run's files were changed
        config = agreed(folder, asked).model_copy(update={"home": config.home, "run": config.run})
    elif config.fork:
        config = forked(config, asked)
    loss_of(config)
    config = completed(config)
    is_new = not (config.run and (folder / "run.json").exists())
    if is_new or "track" in asked:  # who only has a request applied need not have the tracker
        check_tracker(config)
    if is_new:
        check_writable(finite(config.unlearn))
        if not config.fork:
            check_owners(config)
    return config


def asked_for(words: list[str], config: Config) -> dict[str, Any]:
    """The settings that words name, one by one or as a mapping, but for those that say which run it is."""
    names = {name_of(word) for word in spelled_out(words)} - {"run", "home", "fork"}
    groups = tuple(f"{name}." for name in names)
    return {name: value for name, value in values_of(config).items() if name in names or name.startswith(groups)}


def _scale_line(config: Config) -> str:
    limit = f", {config.data.limit:,} images" if config.data.limit else ", all images"
    model = f"width {config.model.width}" if config.model.name in OURS else config.model.name
    line = f"{config.data.name}: {model}{limit}, {config.rounds} rounds of {config.clients} clients"
    if config.scale == "laptop":
        line += "\nscale=laptop, since there is no GPU or it was asked for; the paper's size: scale=full"
    return line
