"""The runs of a state folder: found, opened, resumed, given more rounds, forked."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedunlearn.config import Config, check, state_home, values_of
from fedunlearn.errors import UserError
from fedunlearn.runs.files import delete_unfinished, write_atomically
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.lock import is_locked, lock
from fedunlearn.runs.run import Run, open_ledger, read_about, stored_config
from fedunlearn.schema import validated

if TYPE_CHECKING:
    from fedunlearn.build import Images

log = getLogger("fedunlearn")

OPERATIONAL = ("timeout", "window")  # settings that change no result, so that a run may be resumed with others
SAME = ("clients", "data.", "partition.", "model.")  # settings that a fork must share with the run it goes on from
PACKAGES = ("fedunlearn", "flwr", "ray", "torch", "torchvision", "numpy")


def open_run(name: str | None = None, *, home: str = "") -> Run:
    """Open a run to look at it and to ask for something.

    Args:
        name: of the run; without one the live run, else the newest finished one.
        home: state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn.

    Raises:
        UserError: there is no such run.

    Example:
        `fedunlearn.open_run("demo").request([3])`
    """
    return Run.opened(find_run(state_home(home), name))


def find_run(home: Path, name: str | None) -> Path:
    """Find the folder of the run `name`; without one, of the live run, else of the newest finished one.

    Raises:
        UserError: with the runs that there are.
    """
    if name:
        folder = runs_folder(home) / name
        if not (folder / "run.json").exists():
            raise UserError(f"no run {name} in {runs_folder(home)}: there are {_names(all_runs(home))}")
        return folder
    newest_first = [folder for folder in all_runs(home)[::-1] if created_of(folder)]
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
def locked_run(config: Config, *, fingerprint: str, images: "Images", asked: Mapping[str, Any]) -> Iterator[Run]:
    """Lock the run `config.run`, making it where it is new; its own stored settings count where it is not.

    Args:
        config: the settings of a new run.
        fingerprint: of the data set.
        images: what a new run keeps of them.
        asked: settings that were named explicitly, by dotted name. A run that exists must agree with them, but for
            more `rounds` than it has: then it goes on.

    Raises:
        UserError: another process holds the run, it has other settings than `asked`, or other data.
    """
    name = config.run or f"{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}"
    config = config.model_copy(update={"run": name})
    folder = runs_folder(state_home(config.home)) / name
    with lock(folder):
        if not (folder / "run.json").exists():
            _make(folder, config, {"data": fingerprint, "images": images._asdict()})
        ledger = open_ledger(folder)
        try:
            about, stored, kept = read_about(folder), stored_config(folder), agreed(folder, asked)
            check_data(folder, fingerprint)
            if kept != stored:
                write_about(folder, ledger, about | {"config": kept.model_dump()})
            operational = {setting: value for setting, value in asked.items() if setting in OPERATIONAL}
            run = Run(folder, kept.model_copy(update={"home": config.home, "run": name, **operational}), ledger)
            tidy(run)
            yield run
        finally:
            ledger.close()


def tidy(run: Run) -> None:
    """Delete what a crash left of a run that this process holds: files half-written, and older checkpoints."""
    delete_unfinished(run.folder)
    delete_unfinished(run.folder.parent.parent / "heads", f"{run.name}.json")
    if current := run.ledger.current():
        run.delete_all_but(current.checkpoint)


def check_data(folder: Path, fingerprint: str) -> None:
    """Raise UserError where a run was trained on other data."""
    of_run = read_about(folder)["data"]
    if of_run != fingerprint:
        raise UserError(f"run {folder.name} was trained on other data ({of_run[:12]}, now {fingerprint[:12]})")


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


def _make(folder: Path, config: Config, data: Mapping[str, Any]) -> None:
    if config.fork:
        base = find_run(state_home(config.home), config.fork)
        if read_about(base)["data"] != data["data"]:
            raise UserError(f"run {config.fork} was trained on other data: a fork goes on from it")
        with lock(base):
            _copy(base, folder)
    versions = {package: version(package) for package in PACKAGES}
    content = {"created": datetime.now(UTC).isoformat(), **data, "versions": versions}
    ledger = Ledger(folder / "ledger.sqlite")
    try:
        if not config.fork:
            ledger.begin_anew()
            if ledger.current():
                raise UserError(f"{folder / 'run.json'} is missing: put back a copy of it, or remove the folder")
        write_about(folder, ledger, content | {"config": config.model_dump()})
    finally:
        ledger.close()


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
    """Give the stored settings, if they agree with those asked for, but for more rounds.

    Raises:
        UserError: naming the first that does not.
    """
    kept = stored_config(folder)
    values, rounds = values_of(kept), max(kept.rounds, asked.get("rounds", 0))
    for name, value in asked.items():
        if values.get(name) != value and name not in OPERATIONAL and (name, value) != ("rounds", rounds):
            raise UserError(f"run {folder.name} has {name}={values.get(name)}, not {value}: use another run name")
    if rounds == kept.rounds:
        return kept
    return with_values(kept, {"rounds": rounds, "train.schedule_rounds": kept.train.schedule_rounds or kept.rounds})


def write_about(folder: Path, ledger: Ledger, content: dict[str, Any]) -> None:
    """Write a run's `run.json`; the ledger knows its SHA-256 before."""
    data = json.dumps(content, indent=2).encode()
    ledger.keep_about(hashlib.sha256(data).hexdigest())
    write_atomically(folder / "run.json", data)
    ledger.about_written()


def _names(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders) or "none"
