"""What begins in Python: a run in the background, or a handle on one that exists."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedunlearn.apps.resources import Resources
from fedunlearn.config import Config, state_home
from fedunlearn.errors import UserError
from fedunlearn.live.background import Background
from fedunlearn.live.handle import LiveRun
from fedunlearn.live.words import words_of
from fedunlearn.runs.home import find_run, log_of, new_name, runs_folder
from fedunlearn.runs.lock import is_locked


def run(
    app: str | Path = "digits",
    *,
    engine: str = "ray",
    nodes: int = 10,
    cpus: int = 1,
    gpus: float = 0.0,
    workers: int = 0,
    **settings: Any,
) -> LiveRun:
    """Train a run in the background, or go on with one: `fedunlearn run` from Python.

    The run has a process of its own. It goes on where a cell is interrupted or the kernel ends; `stop()` ends it, and
    the same call goes on with it if it has a name (`run="demo"`).

    Args:
        app: digits, cifar10, cifar100, scaling, or the folder of an app.
        engine: `ray` (worker processes), or `local` (one process, ready at once).
        nodes: virtual nodes, at most one a client.
        cpus: of a node while it works.
        gpus: GPU fraction of a node while it works.
        workers: Ray's worker processes; 0 for as many as the CPUs hold.
        settings: as `fedunlearn config` lists them; those of a group are a mapping, as `model={"width": 8}`.

    Returns:
        A handle on the run, at once.

    Raises:
        UserError: there is no such app or setting, a value is wrong, or the run is live. Nothing is started then.

    Example:
        >>> run = fedunlearn.run("digits", rounds=8, model={"width": 8})  # doctest: +SKIP
        >>> run.wait().metrics()["test_accuracy"].iloc[-1]  # doctest: +SKIP
        0.731
    """
    resources = Resources(engine, nodes, cpus, gpus, workers)
    words = words_of(settings, options=("app", *asdict(resources)))
    resources.check()
    config = _checked(str(app), words)
    home, words = state_home(config.home), [word for word in words if not word.startswith(("run=", "home="))]
    name, log = (config.run, log_of(home, config.run)) if config.run else _unused_name(home, config.data.name)
    if is_locked(runs_folder(home) / name):
        here = repr(name) if home == state_home() else f"{name!r}, home={str(home)!r}"
        raise UserError(f"run {name} is live: fedunlearn.open_run({here}) is a handle on it")
    own = [f"run={name}", f"home={home}"]
    process = Background.started(["run", str(app), *words, *own, *resources.options()], log)
    return LiveRun(name, home, replace(resources, nodes=min(nodes, config.clients)), process)


def open_run(name: str | None = None, *, home: str = "", engine: str = "ray", nodes: int = 2) -> LiveRun:
    """Give a handle on a run that exists.

    Args:
        name: of the run; without one the live run, else the newest finished one.
        home: state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn.
        engine: that `forget` and `audit` work with, `ray` or `local`.
        nodes: virtual nodes that they work with.

    Raises:
        UserError: there is no such run.

    Example:
        `fedunlearn.open_run("demo").forget(clients=[3])`
    """
    folder = find_run(state_home(home), name)
    return LiveRun(folder.name, folder.parent.parent, Resources(engine, nodes))


def _checked(app: str, words: list[str]) -> Config:
    """Give the settings of a run, after every check that needs no data."""
    from fedunlearn.apps.server_app import asked_for, prepared
    from fedunlearn.apps.simulate import app_folder
    from fedunlearn.composing import compose

    config = compose(app_folder(app) / "conf", words)
    return prepared(config, asked_for(words, config))


def _unused_name(home: Path, data: str) -> tuple[str, Path]:
    """Make up a name that no run has, by data set and time; its log is made so that nobody else takes it."""
    first = new_name(data)
    number = 1
    while True:
        name = first if number == 1 else f"{first}-{number}"
        log = log_of(home, name)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return name, log
