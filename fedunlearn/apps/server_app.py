"""What Flower runs on the server: open a run or resume it, train and forget, report."""

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.apps import retrying_actor
from fedunlearn.apps.registry import strategy_of
from fedunlearn.build import open_dataset
from fedunlearn.config import Config, compose, settings, split_overrides, state_home
from fedunlearn.errors import UserError
from fedunlearn.federation.client import Worker
from fedunlearn.runs import report
from fedunlearn.runs.run import Run, open_run, runs_folder, stored_config


def log(line: str) -> None:
    """Print at once, so that a streamed log keeps pace."""
    print(line, flush=True)


class OneLine(logging.Filter):
    """Lets Flower log a UserError as the line that it is, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; always keep it."""
        if record.exc_info and isinstance(record.exc_info[1], UserError):
            record.msg, record.args, record.exc_info = str(record.exc_info[1]), (), None
        return True


def server_app(conf: Path) -> ServerApp:
    """The ServerApp of the Hydra configuration folder `conf`; its run config has one string, `overrides`."""
    retrying_actor.install()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        logging.getLogger("flwr").addFilter(OneLine())
        overrides = str(context.run_config.get("overrides", ""))
        config = compose(conf, overrides)
        with _open(config, _asked(overrides, config)) as run:
            train(grid, run)

    return app


def forget_app(config: Config) -> ServerApp:
    """The ServerApp that serves the open requests of an existing run, without any other training."""
    retrying_actor.install()
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with _open(config, {}) as run:
            carry_out(grid, run, rounds=0)

    return app


def train(grid: Grid, run: Run) -> None:
    """Train the rounds that are missing, forget what is asked, write the report and print the summary.

    Raises:
        UserError: with the way on, where no round could be trained.
    """
    log(_scale_line(run.config))
    head = run.ledger.head()
    if head is not None and head.round > 0:
        log(f"run {run.name} goes on after round {head.round} of {run.config.rounds} ({run.folder})")
    else:
        log(f"run {run.name} starts ({run.folder})")
    try:
        carry_out(grid, run, rounds=run.config.rounds - (head.round if head else 0))
    except UserError as error:
        head = run.ledger.head()
        way_on = f'continue from round {head.round if head else 0} with overrides="run={run.name}"'
        raise UserError(f"{error}; {way_on}") from error


def carry_out(grid: Grid, run: Run, *, rounds: int) -> None:
    """Train `rounds` rounds, serve all requests, write the report."""
    strategy = strategy_of(run.config.strategy)(run, Worker(run.config), log=log)
    strategy.start(grid, rounds)
    page = report.write(run, strategy.worker)
    log(report.summary(run))
    log(f"report: {page}")


def _open(config: Config, asked: dict[str, Any]) -> AbstractContextManager[Run]:
    folder = runs_folder(state_home(config.home)) / config.run
    if config.run and (folder / "run.json").exists():
        config = replace(stored_config(folder), home=config.home)
    return open_run(config, fingerprint=open_dataset(config, log=log).fingerprint, asked=asked)


def _asked(overrides: str, config: Config) -> dict[str, Any]:
    """The settings that `overrides` names, one by one or as a mapping, but for those that say which run it is."""
    names = {word.lstrip("+").split("=")[0] for word in split_overrides(overrides)} - {"run", "home"}
    groups = tuple(f"{name}." for name in names)
    return {name: value for name, _, value in settings(config) if name in names or name.startswith(groups)}


def _scale_line(config: Config) -> str:
    limit = f", {config.data.limit:,} images" if config.data.limit else ", all images"
    line = f"{config.data.name}: width {config.model.width}{limit}, {config.rounds} rounds of {config.clients} clients"
    if config.scale == "laptop":
        line += '\nscale=laptop, since there is no GPU or it was asked for; the paper\'s size: overrides="scale=full"'
    return line
