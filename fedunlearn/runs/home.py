"""The runs of a state folder: found, opened, resumed, given more rounds, forked."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedunlearn.composing import check
from fedunlearn.config import Config, state_home, stored, values_of
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError, printable
from fedunlearn.naming import as_typed, for_shell, name_of, named
from fedunlearn.owners import ON_NODES
from fedunlearn.runs.events import EarlierVersionError
from fedunlearn.runs.files import delete_unfinished, write_atomically
from fedunlearn.runs.ledger import FORGOTTEN, Ledger
from fedunlearn.runs.lock import is_locked, lock
from fedunlearn.runs.run import Run, check_about, check_not_empty, open_ledger, read_about, stored_config
from fedunlearn.schema import validated

if TYPE_CHECKING:
    from fedunlearn.build import Images

log = getLogger("fedunlearn")

OPERATIONAL = ("timeout", "window", "track")  # they change no result: a run may be resumed with others
BELIEF = ("client_share",)  # what the run believes from now on: it may be resumed with others, and keeps them
SAME = ("clients", "data.", "partition.", "model.")  # settings that a fork must share with the run it goes on from
RETRAINED = "retrained-"  # how names of runs begin that only serve to be compared with
MOST_LISTED = 20  # runs in an error
MOST_NAMED = 5  # clients whose images have changed
PACKAGES = ("fedunlearn", "flwr", "ray", "torch", "torchvision", "numpy")


def open_run(name: str | None = None, *, home: str = "") -> Run:
    """Open a run's folder to look at it and to ask for something; `fedunlearn.open_run` gives a handle for people.

    Args:
        name: of the run; without one the live run, else the newest finished one.
        home: state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn.

    Raises:
        UserError: there is no such run.

    Example:
        `open_run("demo").request([3])`
    """
    return Run.opened(find_run(state_home(home), name))


def find_run(home: Path, name: str | None) -> Path:
    """Find the folder of the run `name`; without one, of the live run, else of the newest finished one.

    Models that an audit has retrained are found by name alone.

    Raises:
        UserError: with the runs that there are.
    """
    if name:
        folder = runs_folder(home) / name
        if not (folder / "run.json").exists():
            raise UserError(f"no run {name} in {runs_folder(home)}: there are {_names(all_runs(home)[::-1])}")
        return folder
    newest_first = [
        folder for folder in all_runs(home)[::-1] if created_of(folder) and not folder.name.startswith(RETRAINED)
    ]
    live = [folder for folder in newest_first if is_locked(folder)]
    if len(live) > 1:
        raise UserError(f"{len(live)} runs are live: name one with --run ({_names(live)})")
    for folder in chain(live, filter(is_finished, newest_first)):
        return folder
    if newest_first:
        raise UserError(
            f"no run in {runs_folder(home)} is live or finished: name one with --run ({_names(newest_first)})"
        )
    raise UserError(f"no run in {runs_folder(home)}: start one with 'fedunlearn run digits'")


def runs_folder(home: Path) -> Path:
    """Say where runs lie in a state folder."""
    return home / "runs"


def new_name(of: str) -> str:
    """Make up the name of a run that begins now: what it is of, as the data set, and the time."""
    return f"{of}-{datetime.now():%Y%m%d-%H%M%S}"


def log_of(home: Path, name: str) -> Path:
    """Say where a process in the background writes its lines about a run to."""
    return home / "logs" / f"{name}.log"


def is_run(home: Path, name: str) -> bool:
    """Say whether a name is that of a run, and no way to another folder."""
    return name in {path.parent.name for path in runs_folder(home).glob("*/run.json")}


def all_runs(home: Path) -> list[Path]:
    """List the folders of all runs: damaged ones first, then by age, the oldest first."""
    return sorted((path.parent for path in runs_folder(home).glob("*/run.json")), key=created_of)


def created_of(folder: Path) -> str:
    """Give the time at which a run was made; nothing where its `run.json` is damaged."""
    try:
        return str(read_about(folder)["created"])
    except UserError:
        return ""


def is_finished(folder: Path) -> bool:
    """Say whether all rounds of a run are trained, and this version knows its settings."""
    try:
        run = Run.opened(folder)
    except UserError as error:
        log.warning("run %s is passed over: %s", folder.name, error)
        return False
    try:
        current = run.ledger.current()
        return current is not None and current.round >= run.config.rounds
    finally:
        run.ledger.close()


@contextmanager
def locked_run(config: Config, *, data: Mapping[str, str], images: "Images", asked: Mapping[str, Any]) -> Iterator[Run]:
    """Lock the run `config.run`, making it where it is new; its own stored settings count where it is not.

    Args:
        config: the settings of a new run.
        data: SHA-256 of what each client has, and of the held-out images.
        images: what a new run keeps of them.
        asked: settings that were named explicitly, by dotted name. A run that exists must agree with them, but for
            more `rounds` than it has: then it goes on.

    Raises:
        UserError: another process holds the run, it has other settings than `asked`, or other data.
    """
    name = config.run or new_name(config.data.name)
    config = config.model_copy(update={"run": name})
    folder = runs_folder(state_home(config.home)) / name
    with lock(folder, trains=True):
        if not (folder / "run.json").exists():
            _make(folder, config, data, images)
        ledger = open_ledger(folder)
        try:
            about, stored, kept = read_about(folder), stored_config(folder), agreed(folder, asked)
            operational = {setting: value for setting, value in asked.items() if setting in OPERATIONAL}
            run = Run(folder, kept.model_copy(update={"home": config.home, "run": name, **operational}), ledger)
            check_data(run, data)
            _check_classes(run, images)
            if kept != stored:
                write_about(folder, ledger, about | {"config": kept.model_dump()})
            tidy(run)
            yield run
        finally:
            ledger.close()


def tidy(run: Run) -> None:
    """Delete what a crash left of a run that this process holds: files half-written, and older checkpoints."""
    head = run.ledger.head_file
    delete_unfinished(run.folder)
    delete_unfinished(head.parent, head.name)
    if current := run.ledger.current():
        run.delete_all_but(current.checkpoint)


def check_data(run: Run, data: Mapping[str, str]) -> None:
    """Raise UserError where the images of clients that still take part are others than a run was trained on."""
    if others := changed(run, data):
        hint = "put the files back as they were, or take another run name"
        raise UserError(f"run {run.name} was trained on other data ({others}): {hint}")


def _check_classes(run: Run, images: "Images") -> None:
    known = run.class_names()
    if known != images.class_names:
        raise UserError(
            f"run {run.name} knows the classes {', '.join(known)}, and the images have {', '.join(images.class_names)}"
        )


def changed(run: Run, data: Mapping[str, str]) -> str:
    """Say whose images are others than those of a run; of clients that were forgotten it no longer matters.

    Of some images of a client it does not either: whoever was asked to forget them deletes the files.
    """
    forgotten = {
        str(client) for request in run.ledger.requests() if request.state in FORGOTTEN for client in request.owners
    }
    if run.config.partition.is_on_nodes:  # every machine is asked itself when it introduces itself
        forgotten |= set(map(str, range(run.config.clients)))
    others = [name for name, sha256 in run.about()["data"].items() if data.get(name) != sha256]
    others = [run.named([int(name)]) if name.isdecimal() else name for name in others if name not in forgotten]
    more = f" and of {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    return f"other images of {', '.join(others[:MOST_NAMED])}{more}" if others else ""


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Give the settings with other values for some dotted names."""
    content = config.model_dump()
    for name, value in values.items():
        group = content
        *groups, leaf = name.split(".")
        for part in groups:
            group = group[part]
        group[leaf] = value
    return check(validated(Config, content))


def forked(config: Config, asked: Mapping[str, Any]) -> Config:
    """Give the settings of a fork: those of the run `config.fork`, with what was asked for on top.

    Raises:
        UserError: there is no such run, or another data set, partition or model was asked for.
    """
    base = stored_config(find_run(state_home(config.home), config.fork))
    values = values_of(base)
    for name, value in asked.items():
        if name.startswith(SAME) and values.get(name) != value:
            raise UserError(f"run {config.fork} has {name}={values.get(name)}, not {value}: a fork goes on from it")
    if asked.get("rounds", 0) > base.rounds:
        asked = {"train.schedule_rounds": base.train.schedule_rounds or base.rounds, **asked}
    if asked.get("strategy", base.strategy) != base.strategy:
        base = base.model_copy(update={"unlearn": {}})
    return with_values(base, {"home": config.home, "run": config.run, "fork": config.fork, **asked})


def file_first(
    folder: Path, owners: Iterable[int], selection: Selection | None, *, clients: int, all_clients: bool = False
) -> None:
    """Ask a run that does not exist yet to forget clients, or some of their images: it never trains on them.

    Args:
        folder: of the run that will begin there.
        owners: clients whose images are meant.
        selection: which of them; None for all.
        clients: C.
        all_clients: whether `owners` are all that there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        ledger.begin_anew()
        ledger.file(owners, selection=selection, all_clients=all_clients, first_portion=clients)
    finally:
        ledger.close()


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        with suppress(PackageNotFoundError):  # a run from its sources, or one that needs no Ray
            yield package, version(package)


def _make(folder: Path, config: Config, data: Mapping[str, str], images: "Images") -> None:
    never = set(config.forget.schedule.get(0, []))
    if config.fork:
        base = find_run(state_home(config.home), config.fork)
        data, forgotten = _of_base(base, data)
        never |= forgotten
    readmitted = readmitted_by(config, data, never)
    if config.fork:
        with lock(base):
            _copy(base, folder)
    about = {"data": dict(data), "images": images._asdict(), "versions": dict(_versions())}
    content = {"created": datetime.now(UTC).isoformat(), **about}
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        if not config.fork:
            ledger.begin_anew()
            if ledger.current():
                raise UserError(f"{folder / 'run.json'} is missing: put back a copy of it, or remove the folder")
        write_about(folder, ledger, content | {"config": config.model_dump()})
        if readmitted:
            ledger.readmit(readmitted)
    finally:
        ledger.close()


def readmitted_by(config: Config, data: Mapping[str, str], never: Collection[int]) -> dict[int, str]:
    """Give the clients that a new run trains although another run of the state folder has forgotten them.

    Args:
        config: settings of the new run.
        data: SHA-256 of what each client has.
        never: clients that never take part in it.

    Returns:
        By client, the run and request that forgot it.

    Raises:
        UserError: `readmit` does not name one of them, or nobody knows whom a damaged run has forgotten.
    """
    banned, unknown = forgotten_in(state_home(config.home), but=config.run)
    if unknown and not config.is_for_good:
        run, reason = min(unknown.items())
        log.warning("whom run %s has forgotten is not known (%s)", run, reason)
        unknown = {}
    found: dict[int, str] = {}
    refused: dict[int, str] = {}
    values = config.model_dump(include={"data", "partition"})
    for client in sorted(set(range(config.clients)) - set(never)):
        who = name_of(client, config.partition.names)
        known = (data[str(client)], *_keys_of(config, client), owner(values, client))
        names = {*known} & banned.keys()
        if names and client not in config.readmit:
            refused[client] = banned[min(names)]
        elif unknown and client not in config.readmit:
            run, reason = min(unknown.items())
            raise UserError(
                f"whom run {run} has forgotten is not known, perhaps client {who} ({reason}): repair or remove that "
                "run, or take every client back by naming all of them in readmit"
            )
        if names or unknown:
            found[client] = banned[min(names)] if names else f"run {min(unknown)}, perhaps"
    if refused:
        raise UserError(_way_in(config, refused))
    return found


def check_owners(config: Config) -> None:
    """Raise UserError where a new run names clients that another has forgotten: then none of their images is read.

    Names and keys tell that. Whether a client's images are those of a forgotten one, `readmitted_by` sees.
    """
    banned, _ = forgotten_in(state_home(config.home), but=config.run)
    values, refused = config.model_dump(include={"data", "partition"}), {}
    for client in {*range(config.clients)} - {*config.forget.schedule.get(0, []), *config.readmit}:
        if names := {*_keys_of(config, client), owner(values, client)} & banned.keys():
            refused[client] = banned[min(names)]
    if refused:
        raise UserError(_way_in(config, refused))


def _keys_of(config: Config, client: int) -> list[str]:
    return [keys.get(client, "") for keys in (config.forget.keys, config.partition.keys)]


def _way_in(config: Config, refused: Mapping[int, str]) -> str:
    """Say who was forgotten by which request, and the settings with which a run begins all the same.

    Args:
        config: of the run that is to begin; what it says already is in these settings too.
        refused: by client, the run and request that forgot it.
    """
    names, own, several = config.partition.names, sorted(refused), len(refused) > 1
    by = {where: [client for client in own if refused[client] == where] for where in refused.values()}
    who = "; ".join(
        f"{named(clients, names)} {'were' if len(clients) > 1 else 'was'} forgotten by {where}"
        for where, clients in by.items()
    )
    schedule = {0: [], **config.forget.schedule}
    schedule[0] = sorted({*schedule[0], *own})
    rounds = ",".join(f"{round_}:{as_typed(clients, names)}" for round_, clients in schedule.items())
    without = for_shell(f"forget.schedule={{{rounds}}}")
    back = for_shell(f"readmit={as_typed(sorted({*config.readmit, *own}), names)}")
    them = "them" if several else "it"
    return f"{who}: leave {them} out with {without}, or take {them} back with {back}"


class Banned(NamedTuple):
    """Whom the runs of a state folder have forgotten for good.

    Attributes:
        names: by fingerprint, key and owner, run and request.
        unknown: the runs of which nobody knows whom they have forgotten, each with the reason.
    """

    names: dict[str, str]
    unknown: dict[str, str]


def forgotten_in(home: Path, *, but: str = "", taken_back: Collection[str] = ()) -> Banned:
    """Give whom the runs of a state folder, but one, have forgotten for good, as far as their files can be read.

    Args:
        home: the state folder.
        but: a run that does not count.
        taken_back: fingerprints, keys and owners of clients that may come back with all that is known of them.
    """
    names: dict[str, str] = {}
    unknown: dict[str, str] = {}
    files = chain(*(runs_folder(home).glob(f"*/{file}") for file in ("run.json", "ledger.sqlite")))
    for folder in sorted({file.parent for file in files if file.parent.name != but}, key=created_of):
        try:
            names = _forgotten_by(folder, frozenset(taken_back)) | names
        except EarlierVersionError as error:  # it forgot nobody for good
            log.warning("run %s is passed over: %s", folder.name, error)
        except UserError as error:
            unknown[folder.name] = str(error)
    return Banned(names, unknown)


def _forgotten_by(folder: Path, taken_back: frozenset[str]) -> dict[str, str]:
    """Whom one run has forgotten for good, by its ledger; `run.json` says who that is.

    Raises:
        UserError: one of the two cannot be read, and there may be somebody.
    """
    if not (folder / "ledger.sqlite").exists():  # opening would make one
        raise UserError(f"{folder / 'ledger.sqlite'} is missing")
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        check_not_empty(folder, ledger)
        purged = {request.id for request in ledger.purged()}
        requests = [request for request in ledger.requests() if request.id in purged or request.state in FORGOTTEN]
        if not requests:
            return {}
        try:
            check_about(folder, ledger)
        except UserError as error:
            log.warning("run %s keeps its ban as far as it can be read: %s", folder.name, error)
    finally:
        ledger.close()
    known, is_for_good = _who_is_who(folder)
    gone = {
        client: f"run {folder.name} (request {request.id})"
        for request in reversed(requests)
        if request.id in purged or is_for_good
        for client in known.keys() & set(request.clients)  # who is asked for a portion trains on
    }
    of_others = {key for client in known.keys() - gone.keys() for key in known[client].keys}
    keys = Counter(key for who in known.values() for key in who.keys)  # a machine may have several clients
    return {
        name: request
        for client, request in gone.items()
        if taken_back.isdisjoint({name for name in known[client].names if keys[name] <= 1})
        for name in known[client].names - of_others - taken_back
    }


def owner(config: Mapping[str, Any], client: int) -> str:
    """Name a client, where clients have names: the same owner in any run.

    The folder of the images is part of it, by whatever path; not where machines have their own.
    """
    split = config.get("partition", {})
    names = split.get("names") or []
    is_on_nodes = split.get("kind") == ON_NODES
    place = ON_NODES if is_on_nodes else os.path.realpath(Path(config["data"]["root"]).expanduser())
    return f"{place}: {names[client]}" if names else ""


class _Who(NamedTuple):
    """By what a client is known again: the fingerprint of its images, its keys, its name."""

    images: str
    keys: frozenset[str]
    owner: str

    @property
    def names(self) -> frozenset[str]:
        return (self.keys | {self.images, self.owner}) - {""}


def _who_is_who(folder: Path) -> tuple[dict[int, _Who], bool]:
    """What `run.json` says of its clients, and whether they are forgotten for good.

    Where the settings are not of this version, they are.
    """
    about = read_about(folder)
    try:
        is_for_good = stored(about["config"]).is_for_good
    except UserError:
        is_for_good = True
    try:
        config, data = about["config"], about["data"]
        keys = [*(config.get(group, {}).get("keys", {}) for group in ("forget", "partition")), about.get("keys", {})]
        known = {
            client: _Who(
                str(data[str(client)]),
                frozenset(str(each.get(str(client), "")) for each in keys) - {""},
                owner(config, client),
            )
            for client in range(config["clients"])
        }
        return known, is_for_good
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'run.json'} is damaged: it does not say who the clients are") from error


def _of_base(base: Path, data: Mapping[str, str]) -> tuple[dict[str, str], set[int]]:
    """The fingerprints of the run that a fork goes on from, if its images are still the same, and whom it forgot."""
    run = Run.opened(base)
    try:
        check_data(run, data)
        return run.about()["data"], set(run.ledger.clients_in(FORGOTTEN))
    finally:
        run.ledger.close()


def _copy(base: Path, folder: Path) -> None:
    """Copy what a run has kept; its ledger through SQLite, so that it is whole."""
    for part in base.iterdir():
        if part.is_dir() and part.name != "report":
            shutil.copytree(part, folder / part.name, dirs_exist_ok=True)
    if (base / "metrics.jsonl").exists():
        shutil.copy(base / "metrics.jsonl", folder)
    (folder / "ledger.sqlite").unlink(missing_ok=True)  # of a copy that was interrupted
    source, copy = open_ledger(base), Ledger(folder / "ledger.sqlite")
    try:
        source.copy_to(copy)
    finally:
        source.close()
        copy.close()


def agreed(folder: Path, asked: Mapping[str, Any]) -> Config:
    """Give the stored settings, if they agree with those asked for, but for more rounds and for what is believed.

    Raises:
        UserError: naming the first that does not.
    """
    kept = stored_config(folder)
    values, rounds = values_of(kept), max(kept.rounds, asked.get("rounds", 0))
    for name, value in asked.items():
        if values.get(name) != value and name not in OPERATIONAL + BELIEF and (name, value) != ("rounds", rounds):
            raise UserError(f"run {folder.name} has {name}={values.get(name)}, not {value}: use another run name")
    changes = {name: asked[name] for name in BELIEF if asked.get(name, values[name]) != values[name]}
    if rounds != kept.rounds:
        changes |= {"rounds": rounds, "train.schedule_rounds": kept.train.schedule_rounds or kept.rounds}
    return with_values(kept, changes) if changes else kept


def write_about(folder: Path, ledger: Ledger, content: dict[str, Any]) -> None:
    """Write a run's `run.json`; the ledger knows its SHA-256 before."""
    data = json.dumps(content, indent=2).encode()
    ledger.keep_about(hashlib.sha256(data).hexdigest())
    write_atomically(folder / "run.json", data)
    ledger.about_written()


def _names(folders: list[Path]) -> str:
    names = [printable(folder.name) for folder in folders]
    more = [f"{len(names) - MOST_LISTED} more"] if len(names) > MOST_LISTED else []
    return ", ".join([*names[:MOST_LISTED], *more]) or "none"
