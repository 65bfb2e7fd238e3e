"""Simulate a federation in this process: on Flower's Ray engine, or without Ray."""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedunlearn.errors import UserError

WORK = Callable[[Grid], None]


@dataclass(frozen=True)
class Resources:
    """What a simulation runs on.

    Attributes:
        engine: `ray` (several worker processes), or `local` (this process alone, ready at once).
        nodes: virtual nodes.
        cpus: of a node while it works; with `workers` all of them.
        gpus: GPU fraction of a node while it works.
        workers: Ray's worker processes; 0 for as many as the machine's CPUs hold.
    """

    engine: str = "ray"
    nodes: int = 10
    cpus: int = 1
    gpus: float = 0.0
    workers: int = 0

    def check(self) -> None:
        """Raise UserError for what no simulation can have."""
        if self.engine not in ("ray", "local"):
            raise UserError(f"--engine {self.engine} is not one of ray, local")
        if self.nodes < 1:
            raise UserError(f"--nodes {self.nodes} is too few: a simulation has at least 1")
        if self.cpus < 1:
            raise UserError(f"--cpus {self.cpus} is too few: a node needs at least 1")
        if self.gpus:
            import torch

            if not torch.cuda.is_available():
                raise UserError(f"--gpus {self.gpus:g}: there is no GPU here, leave it out")


def simulate(work: WORK, resources: Resources, *, verbose: bool = False) -> None:
    """Let `work` use a grid of virtual nodes that run the client app.

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

        work(LocalGrid(resources.nodes, app))
    else:
        _on_ray(work, resources, verbose=verbose)


def _not_raised_again(record: logging.LogRecord) -> bool:
    """Drop what Flower says of an exception of the server's work, which is raised to the caller."""
    return record.funcName != "server_th_with_start_checks"


def _on_ray(work: WORK, resources: Resources, *, verbose: bool) -> None:
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

    init = {"num_cpus": resources.workers * resources.cpus} if resources.workers else {}
    init |= {} if verbose else {"logging_level": logging.ERROR, "log_to_driver": False}
    init |= {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}  # it takes seconds to start
    backend = {"client_resources": {"num_cpus": resources.cpus, "num_gpus": resources.gpus}, "init_args": init}
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
