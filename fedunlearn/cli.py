"""One command, `fedunlearn`, with commands below it: `run`, `forget`, `runs`, `requests`, `report`, `demo` and others.

Nothing here imports torch, Flower or Ray before a command needs it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from click import Context, HelpFormatter
from pydantic import BaseModel
from typer.core import TyperCommand

from fedunlearn import __version__
from fedunlearn.apps.signals import GAVE_UP, stopped_by_signals
from fedunlearn.commands import AsJson, Home, RunName, in_one_line, opened, read_names
from fedunlearn.composing import compose
from fedunlearn.config import Config, state_home, writable_home
from fedunlearn.data.selection import Selection
from fedunlearn.deploying import deploy_cli
from fedunlearn.errors import UserError
from fedunlearn.evidence import keys_cli, verify
from fedunlearn.leave import leave
from fedunlearn.log import set_up
from fedunlearn.naming import as_command, class_numbers, for_shell
from fedunlearn.residue import purge, scan
from fedunlearn.runs.home import all_runs, new_name, runs_folder
from fedunlearn.runs.ledger import FAILED, Request
from fedunlearn.runs.overview import glance, size_of
from fedunlearn.runs.run import last_round
from fedunlearn.runs.signed import action_of
from fedunlearn.schema import fields_of, is_mapping, range_of
from fedunlearn.schema import name_of as setting_of

if TYPE_CHECKING:
    from fedunlearn.runs.run import Run
    from fedunlearn.runs.signed import SignedRequest

log = getLogger("fedunlearn")

cli = typer.Typer(
    name="fedunlearn",
    help="Train a model with clients, and let it forget those that withdraw.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cli.add_typer(keys_cli, name="keys")
cli.add_typer(deploy_cli, name="deploy")
study_cli = typer.Typer(help="Compare unlearning with retraining: a table, figures, a report.", no_args_is_help=True)
cli.add_typer(study_cli, name="study")

Engine = Annotated[str, typer.Option(help="ray: worker processes; local: this process alone, ready at once.")]
Cpus = Annotated[int, typer.Option(help="CPUs of a node while it works.")]
Gpus = Annotated[float, typer.Option(help="GPU fraction of a node while it works.")]
Workers = Annotated[int, typer.Option(help="Ray's worker processes; 0: as many as the CPUs hold.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log lines of Flower and Ray too.")]
Words = Annotated[list[str] | None, typer.Argument(help="Settings, as rounds=40 'forget.schedule={6:[3]}'.")]


class TakesSettings(TyperCommand):
    """A command whose help lists the settings that it takes, with their ranges and defaults."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the usual help, then the settings, read from their schema only now."""
        super().format_help(ctx, formatter)
        with formatter.section("Settings (name=value)"):
            formatter.write_dl(
                [
                    (f"{name}={default_of(declared)}", f"{range_of(declared)}  {declared.description or ''}".strip())
                    for name, declared in fields_of(SCHEMAS[self.name or ""]())
                ]
            )


def _schema(module: str, name: str) -> Callable[[], type[BaseModel]]:
    return lambda: getattr(import_module(f"fedunlearn.{module}"), name)


SCHEMAS = {
    "run": _schema("config", "Config"),
    "scale": _schema("apps.scale", "ScalingStudy"),
    "paper": _schema("study.pooled.settings", "PaperSettings"),
    "federated": _schema("study.federated.settings", "FederatedSettings"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line.

    The exit status is 0 done, 1 failed or refused, 2 bad input, 3 time ran out, 128 + n stopped by signal n.
    """
    with stopped_by_signals(lambda: "the same command goes on"):
        cli(args=None if arguments is None else list(arguments), prog_name="fedunlearn")
    raise SystemExit(0)


@cli.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Train a model with clients, and let it forget those that withdraw."""
    if version:
        print(__version__)
        raise typer.Exit


@cli.command(cls=TakesSettings)
@in_one_line
def run(
    app: Annotated[str, typer.Argument(help="digits, cifar10, cifar100, scaling, or the folder of an app.")],
    words: Words = None,
    engine: Engine = "ray",
    nodes: Annotated[int, typer.Option(help="Virtual nodes, at most one a client.")] = 10,
    cpus: Cpus = 1,
    gpus: Gpus = 0.0,
    workers: Workers = 0,
    verbose: Verbose = False,
) -> int:
    """Train a run, or go on with one: `fedunlearn run digits rounds=8 run=demo`.

    `fedunlearn config ssd` lists the settings of a strategy.
    """
    set_up(verbose=verbose)
    log.info("fedunlearn %s: %s", __version__, " ".join(map(for_shell, [app, *(words or [])])))
    from fedunlearn.apps.simulate import Resources, app_folder, simulate

    config = compose(app_folder(app) / "conf", words or [])
    if not config.run:
        config = config.model_copy(update={"run": new_name(config.data.name)})
    typed = Resources(engine, nodes, cpus, gpus, workers)
    typed.check()
    from fedunlearn.apps.server_app import asked_for, prepared, train
    from fedunlearn.build import open_dataset
    from fedunlearn.federation.server_data import check_own_code

    complete = prepared(config, asked_for(words or [], config))
    open_dataset(complete)  # what cannot be read, or trained on, is said before Ray starts
    check_own_code(complete)
    log.info("run %s: starting %s", config.run, "Flower and Ray" if engine == "ray" else "in this process")
    folder = runs_folder(state_home(config.home)) / config.run
    named = [word for word in words or [] if setting_of(word) != "run"]
    command = as_command("run", app, *named, f"run={config.run}", *typed.options(usual=False))
    simulate(
        lambda grid: train(grid, config, words or []),
        replace(typed, nodes=min(nodes, complete.clients)),
        way_on=lambda: f"`{command}` goes on after round {last_round(folder)} of {complete.rounds}",
        verbose=verbose,
    )
    with opened(config.run, config.home) as found:
        return int(bool(found.ledger.unmet()))


@cli.command()
@in_one_line
def forget(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTING=VALUE]...", help="Of this request: strategy=..., unlearn.NAME=..."),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(help="A client to forget, by name, or by number where no name is one; several make one request."),
    ] = None,
    class_: Annotated[
        list[str] | None, typer.Option("--class", help="Images of this class alone; of all clients without --client.")
    ] = None,
    patient: Annotated[
        list[str] | None, typer.Option(help="Images of this patient alone; of all clients without --client.")
    ] = None,
    examples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The images alone that this file names, one a line.")
    ] = None,
    run: RunName = "",
    wait: Annotated[bool, typer.Option("--wait", help="Follow a live run's request to its end.")] = False,
    wait_limit: Annotated[float, typer.Option(min=0, help="Seconds that --wait lasts at most.")] = 86400,
    status: Annotated[str, typer.Option(metavar="ID", help="Show one request of the run.")] = "",
    list_: Annotated[bool, typer.Option("--list", help="List the run's requests.")] = False,
    cancel: Annotated[str, typer.Option(metavar="ID", help="Take back a request that was not taken up yet.")] = "",
    accept: Annotated[str, typer.Option(metavar="ID", help="Apply a request again, without the gate.")] = "",
    by: Annotated[str, typer.Option(help="Who asks, or who answers for --accept; the receipt says it.")] = "",
    right: Annotated[str, typer.Option(help="By what right, as 'Art. 17 GDPR'; the receipt says it.")] = "",
    key: Annotated[Path | None, typer.Option(help="The client's private key, to sign the request with.")] = None,
    signed: Annotated[Path | None, typer.Option(help="What the client has signed (`fedunlearn keys ask`).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and file nothing.")] = False,
    as_json: AsJson = False,
    home: Home = "",
    engine: Engine = "ray",
    nodes: Annotated[int, typer.Option(help="Without a live run: virtual nodes.")] = 2,
    gpus: Gpus = 0.0,
    verbose: Verbose = False,
) -> int:
    """Have clients forgotten: a live run takes the request, else it is applied here and now."""
    set_up(verbose=verbose)
    with opened(run, home) as found:
        if list_:
            return show(found, found.ledger.requests(), as_json)
        if status:
            return show(found, [found.ledger.request(status)], as_json)
        if cancel:
            from fedunlearn.runs import receipts

            whose = found.ledger.request(cancel).owners
            asked = signed_request(found, whose, key, signed, action=f"cancel {cancel}")
            return show(found, [receipts.cancel(found, cancel, signed=asked)], as_json)
        clients, selection = found.numbers_of(client or []), selected(found, class_ or [], patient or [], examples)
        if accept and (client or selection or words or dry_run or not by):
            raise UserError("--accept ID goes with --by NAME, and with neither --client nor --dry-run nor settings")
        meant = [] if accept else found.meant(clients, selection)
        from fedunlearn.apps import asking
        from fedunlearn.apps.simulate import Resources

        resources = Resources(engine, nodes, gpus=gpus)
        resources.check()
        following: dict[str, Any] = {"limit": wait_limit, "verbose": verbose}
        if accept:
            with still_filed():
                return show(found, [asking.accept(found, accept, by, resources, **following)], as_json)
        earlier, how = found.ledger.covering(meant, selection), settings_of_request(found, words or [])
        found.ledger.check_how(meant, how, selection)
        if not earlier:
            log.info(asking.announcement(found, meant, how, selection))
            if not found.is_live():
                asking.check_servable(found)
        asked = signed_request(found, meant, key, signed, action=action_of(selection))
        if dry_run:
            found.would_take(asked, meant, action=action_of(selection))
            refusal = "" if earlier else foreseen(found, meant, selection)
            log.info("run %s: nothing is filed (--dry-run)", found.name)
            return show(found, earlier, as_json) if earlier else int(bool(refusal))
        about: dict[str, Any] = {"by": by, "right": right, "signed": asked, "how": how, "selection": selection}
        with still_filed():
            asked_for = asking.ask(found, clients, resources, wait=wait, **about, **following)
            return show(found, asked_for, as_json)


def foreseen(found: "Run", clients: list[int], selection: Selection | None) -> str:
    """Say how many images a request would be about, and why it would be refused; gives that reason, if there is one."""
    from fedunlearn.apps.foresight import outlook

    seen = outlook(found, clients, selection)
    if seen is None:
        log.info("how many images are meant is known on the clients' own machines, when these are asked")
        return ""
    log.info("%s", seen.in_words(found))
    if seen.refusal:
        log.warning("the request would be refused: %s", seen.refusal)
    return seen.refusal


def selected(found: "Run", classes: list[str], patients: list[str], examples: Path | None) -> Selection | None:
    """Read which images a request is about; None for all of the clients.

    Raises:
        UserError: there is no such class, or the file names no image.
    """
    if not (classes or patients or examples):
        return None
    names = read_names(examples) if examples else []
    return Selection.by(class_numbers(classes, found.class_names()), patients, names)


def settings_of_request(found: "Run", words: list[str]) -> dict[str, Any]:
    """Give the settings that are others for a request than for its run; nothing without words."""
    if not words:
        return {}
    from fedunlearn.federation.strategy import chosen

    return chosen(found.config, words)


def signed_request(
    found: "Run", clients: list[int], key: Path | None, file: Path | None, *, action: str
) -> "SignedRequest | None":
    """Sign a request here, or read what somebody has signed elsewhere; nothing where neither is asked for."""
    from fedunlearn.runs import signed

    if key and file:
        raise UserError("--key signs the request here, --signed takes one that is signed: give one of them")
    if key:
        return signed.sign(clients, run=found.ledger.key, key=key, action=action)
    return signed.read(file.read_bytes()) if file else None


@cli.command()
@in_one_line
def runs(home: Home = "", as_json: AsJson = False) -> int:
    """List all runs: how far they are, and what was asked of them."""
    rows = [row_of(folder) for folder in all_runs(state_home(home))]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print("no runs")
    else:
        table([list(rows[0]), *([str(value) for value in row.values()] for row in rows)])
    return 0


@contextmanager
def still_filed() -> Iterator[None]:
    """End the command with a line of its own where it waited for long enough: the request goes on without it."""
    try:
        yield
    except TimeoutError as error:
        log.error("%s; the request stays filed", error)
        raise SystemExit(GAVE_UP) from error


def row_of(folder: Path) -> dict[str, Any]:
    """Say of a run how far it is; of a damaged one, what is wrong with it."""
    columns = ("run", "state", "round", "rounds", "data", "strategy", "requests", "MB", "created")
    row: dict[str, Any] = dict.fromkeys(columns, "")
    found = glance(folder)
    row |= {"run": found.run, "state": found.state, "MB": round(size_of(folder) / 1e6, 1)}
    if found.error:
        log.warning("run %s: %s", folder.name, found.error)
        return row
    about = {name: getattr(found, name) for name in ("round", "rounds", "data", "strategy")}
    requests = ", ".join(f"{request.id} {request.state}" for request in found.requests)
    return row | about | {"requests": requests, "created": found.created[:19]}


@cli.command()
@in_one_line
def requests(
    request_id: Annotated[str, typer.Argument(metavar="[ID]", help="One request; without it, all of the run.")] = "",
    run: RunName = "",
    overdue: Annotated[
        bool, typer.Option("--overdue", help="Those alone whose time is over; status 1 if any.")
    ] = False,
    as_json: AsJson = False,
    home: Home = "",
) -> int:
    """List the forget requests of a run, or show one."""
    with opened(run, home) as found:
        if overdue:
            late = found.ledger.overdue()
            show(found, late, as_json, none="no request is overdue")
            return int(bool(late))
        show(found, [found.ledger.request(request_id)] if request_id else found.ledger.requests(), as_json)
    return 0


@cli.command()
@in_one_line
def report(
    run: RunName = "",
    retrained: Annotated[
        str, typer.Option(help="A run in which the forgotten clients never took part, to compare with.")
    ] = "",
    home: Home = "",
) -> int:
    """Write a run's report anew, print its summary and where it lies."""
    set_up()
    from fedunlearn.apps.reports import class_counts_of, write_with
    from fedunlearn.federation.auditor import auditor_of
    from fedunlearn.runs import report as page

    with opened(run, home) as found:
        counts = class_counts_of(found, auditor_of(found.config_here()))
        with opened(retrained, home) if retrained else nullcontext() as other:
            others = [other] if other else []
            path = write_with(found, counts, others)
            compared = page.comparison(found, others) if others else []
        print(page.summary(found, counts))
        for verdict in compared:
            print(f"{verdict.title}: {verdict.text}")
        if other and not compared:
            print(f"run {other.name} was not measured after a round that is measured here too")
        print(f"report: {path}")
    return 0


@cli.command()
@in_one_line
def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Others than 127.0.0.1 can be reached from elsewhere, with a token.")] = (
        "127.0.0.1"
    ),
    engine: Engine = "ray",
    nodes: Annotated[int, typer.Option(help="Without a live run: virtual nodes.")] = 2,
    gpus: Gpus = 0.0,
    home: Home = "",
) -> int:
    """Show a page in the browser: watch runs, ask for clients to be forgotten, read what came of it."""
    set_up()
    from fedunlearn.apps.serve import server
    from fedunlearn.apps.simulate import Resources

    Resources(engine, nodes, gpus=gpus).check()
    options = [f"--engine={engine}", f"--nodes={nodes}", *([f"--gpus={gpus:g}"] if gpus else [])]
    server.serve(writable_home(home), host=host, port=port, options=options)
    return 0


@cli.command()
@in_one_line
def demo(home: Home = "") -> int:
    """Train on handwritten digits, forget a client on the way, and compare with the model retrained without it."""
    set_up()
    from fedunlearn.apps.demo import demonstrate

    if not (page := demonstrate(new_name("demo"), home)):
        return 1
    print(f"report: {page}")
    return 0


@study_cli.command("paper", cls=TakesSettings)
@in_one_line
def study_paper(
    words: Words = None, plan: Annotated[bool, typer.Option("--plan", help="Only show what would be done.")] = False
) -> int:
    """The paper's study on pooled data: `fedunlearn study paper dataset=cifar10 search.trials=20`."""
    from fedunlearn.study.pooled.study import PaperStudy

    return study(PaperStudy, words, plan)


@study_cli.command("federated", cls=TakesSettings)
@in_one_line
def study_federated(
    words: Words = None, plan: Annotated[bool, typer.Option("--plan", help="Only show what would be done.")] = False
) -> int:
    """Strategies beside retraining in federations: `fedunlearn study federated dataset=digits`."""
    from fedunlearn.study.federated.study import FederatedStudy

    return study(FederatedStudy, words, plan)


def study(kind: Callable[[list[str]], Any], words: list[str] | None, plan: bool) -> int:
    """Do what is missing of a study."""
    set_up()
    from fedunlearn.study.dag.command import run_study

    try:
        return run_study(kind(words or []), only_plan=plan)
    except OSError as error:
        raise UserError(str(error)) from error


@cli.command(cls=TakesSettings)
@in_one_line
def scale(
    words: Annotated[list[str] | None, typer.Argument(help="Of the study, as clients=[10,100] actors=[1,2].")] = None,
    app: Annotated[str, typer.Option(help="The Flower app that is measured.")] = "scaling",
    home: Home = "",
) -> int:
    """Measure rounds and forget requests by clients and Ray actors."""
    set_up()
    from fedunlearn.apps.scale import load_study, measure_all
    from fedunlearn.apps.simulate import app_folder

    folder = app_folder(app)
    return measure_all(load_study(folder, words or []), folder, writable_home(home) / "scaling")


@cli.command()
@in_one_line
def config(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="A strategy, a group as train, or a setting.")] = "",
) -> int:
    """List settings with ranges and defaults: of a run, of a group, or of a strategy, and what its clients share."""
    shares: list[list[str]] = []
    rows = [[n, default_of(f), range_of(f), f.description or ""] for n, f in fields_of(Config) if is_asked(n, name)]
    if not rows:
        from fedunlearn.federation.strategy import strategy_class
        from fedunlearn.federation.tasks import tasks_of

        schema: type[BaseModel] = strategy_class(name).Settings
        shares = [[task.name, task.shares] for task in tasks_of(strategy_class(name)).values()]
        rows = [[f"unlearn.{n}", default_of(f), range_of(f), f.description or ""] for n, f in fields_of(schema)]
    table([["setting", "default", "range", "what it means"], *rows] if rows else [[f"{name} has no settings"]])
    if shares:
        print("\nWhat a client shares when it is asked for:")
        table(shares)
    return 0


for command in (verify, purge, scan, leave):
    cli.command()(command)


def is_asked(setting: str, name: str) -> bool:
    """Say whether a setting is the one that is asked for, or in the group that is."""
    return not name or setting == name or setting.startswith(f"{name}.")


def default_of(declared: Any) -> str:
    """Give a setting's default as it would be typed."""
    return "{}" if is_mapping(declared) else json.dumps(declared.default)


def show(run: "Run", requests: list[Request], as_json: bool, *, none: str = "no requests") -> int:
    """Print requests; gives 1 if one of them failed."""
    from fedunlearn.runs.formats import receipt

    if as_json:
        print(json.dumps([asdict(r) | {"names": run.client_names(r.owners)} for r in requests], indent=2))
    elif not requests:
        print(none)
    for request in [] if as_json else requests:
        said = receipt(request.detail, run.names())
        print(f"{request.id}  {request.state:<11}  {run.named(request.clients)}  {said}".rstrip())
    return int(any(request.state in FAILED for request in requests))


def table(rows: list[list[str]]) -> None:
    """Print rows in columns; the last one is wrapped by the terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())
