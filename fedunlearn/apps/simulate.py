"""Simulate a federation in this process: on Flower's Ray engine, or without Ray."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.apps.resources import Resources
from fedunlearn.apps.signals import patience, stopped_by_signals
from fedunlearn.errors import UserError

RAY_SECONDS = 120
WORK = Callable[[Grid], object]


def simulate(work: WORK, resources: Resources, *, way_on: Callable[[], str], verbose: bool = False) -> None:
    """Let `work` use a grid of virtual nodes that run the client app.

    Args:
        way_on: says what the person can do next, where a signal ends this process.

    Raises:
        UserError: and any other exception of `work`, as it was raised.
    """
    resources.check()
    flower = logging.getLogger("flwr")
    flower.setLevel(logging.INFO if verbose else logging.ERROR)
    flower.addFilter(_not_raised_again)
    if resources.engine == "local":
        from fedunlearn.apps.client_app import app
        from fedunlearn.federation.local_grid import LocalGrid

        with stopped_by_signals(way_on):
            work(LocalGrid(resources.nodes, app))
        return
    with stopped_by_signals(way_on):
        _start_ray(resources, verbose=verbose)
        with stopped_by_signals(way_on):  # Ray has taken SIGTERM for itself
            _on_ray(work, resources)


def _not_raised_again(record: logging.LogRecord) -> bool:
    """Drop what Flower says of an exception of the server's work, which is raised to the caller."""
    return record.funcName != "server_th_with_start_checks"


def _start_ray(resources: Resources, *, verbose: bool) -> None:
    """Start Ray in this machine, or connect to the cluster of RAY_ADDRESS, and see whether it has what a node needs."""
    import ray

    cluster = os.environ.get("RAY_ADDRESS")
    init: dict[str, Any] = {"num_cpus": resources.workers * resources.cpus} if resources.workers else {}
    init |= {} if verbose else {"logging_level": logging.ERROR, "log_to_driver": False}
    init |= {} if cluster else {"include_dashboard": False}  # it takes seconds to start
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    with patience(f"Ray at {cluster}" if cluster else "Ray to start", limit=RAY_SECONDS):
        try:
            ray.init(runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}, **init)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"Ray cannot be started: {str(error).strip().splitlines()[0]}") from error
    there = ray.cluster_resources()
    for kind, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if wanted > there.get(kind, 0):
            ray.shutdown()
            raise UserError(f"--{kind.lower()}s {wanted:g} of a node: Ray has {there.get(kind, 0):g} here in all")


def _on_ray(work: WORK, resources: Resources) -> None:
    from flwr.simulation import run_simulation

    from fedunlearn.apps import retrying_actor
    from fedunlearn.apps.client_app import app

    retrying_actor.install()
    raised: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            work(grid)
        except BaseException as error:
            raised.append(error)
            raise

    backend = {"client_resources": {"num_cpus": resources.cpus, "num_gpus": resources.gpus}}
    # run_simulation is deprecated in favour of `flwr run`, which needs an app folder and a background SuperLink
    try:
        run_simulation(server, app, num_supernodes=resources.nodes, backend_config=backend)  # type: ignore[arg-type]
    except Exception:
        if raised:
            raise raised[0] from None
        raise


def app_folder(name: str) -> Path:
    """Find a Flower app: a folder, or one of those that come with the package, such as `digits`.

    Raises:
        UserError: with those that there are.
    """
    if (Path(name) / "conf" / "config.yaml").is_file():
        return Path(name)
    here = Path(__file__).parent.parent
    for place in (here / "simulations", here.parent / "simulations"):
        if (place / name / "conf" / "config.yaml").is_file():
            return place / name
    known: set[str] = set()
    for place in (here / "simulations", here.parent / "simulations"):
        with contextlib.suppress(OSError):
            known |= {path.parent.parent.name for path in place.glob("*/conf/config.yaml")}
    raise UserError(f"there is no app {name}: give a folder, or one of {', '.join(sorted(known))}")
