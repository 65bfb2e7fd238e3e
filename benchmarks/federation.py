"""Seconds a round, ours beside stock Flower's and pfl's: `python -m benchmarks.federation`.

All train the same images for one local epoch a round, in two workers of one thread, and evaluate nothing. The first
round, which starts the workers, is not counted. pfl needs an environment of its own (`benchmarks/peer_pfl.py` says
how): its Python is `--pfl`. Its clients have equally many images, and it does not augment.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import superlink, timing
from fedunlearn.build import open_dataset
from fedunlearn.composing import compose
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.run import Run

HERE = Path(__file__).parent
SCALING = HERE.parent / "simulations" / "scaling"


@dataclass
class Rounds:
    """The counted rounds.

    Attributes:
        seconds: of each.
        clients: that each trained.
        mebibytes: peak memory of the server.
        idle: seconds of each in which even the busiest worker had nothing to do.
    """

    seconds: list[float]
    clients: int
    mebibytes: float
    idle: list[float]

    @property
    def clients_per_second(self) -> float:
        """Give the median."""
        return self.clients / statistics.median(self.seconds)

    def row(self, options: argparse.Namespace, stock: "Rounds | None") -> list[str]:
        """Give the cells of the table."""
        rate = self.clients_per_second
        idle = [i / s for i, s in zip(self.idle, self.seconds, strict=False)]
        return [
            str(self.clients),
            *timing.spread(self.seconds),
            f"{rate * options.images / options.clients:,.0f}",
            f"{rate:,.2f}",
            f"{rate / stock.clients_per_second:.2f}" if stock else "",
            f"{100 * statistics.median(idle):.1f} %" if idle else "",
            f"{self.mebibytes:,.0f}",
        ]


def main() -> None:
    """Print one table."""
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ["FEDUNLEARN_HOME"] = home
        results = {name: run() for name, run in candidates(options, Path(home)).items()}
    stock = results.get("stock Flower, fp32")
    rows = [[name, *rounds.row(options, stock)] for name, rounds in results.items()]
    columns = ("rounds of", "clients", "s: median", "min", "max", "images/s", "clients/s", "x stock", "idle", "MiB")
    title = f"width {options.width}, {options.images} images of {options.image_size} pixels, batch {options.batch}"
    timing.table(f"{title}, {options.clients} clients, {options.rounds - 1} rounds counted", columns, rows)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    p = argparse.ArgumentParser("python -m benchmarks.federation", description=__doc__)
    p.add_argument("--clients", type=int, default=10)
    p.add_argument("--images", type=int, default=2000)
    p.add_argument("--image-size", type=int, default=32)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--rounds", type=int, default=4)
    p.add_argument("--partition", default="dirichlet", choices=("dirichlet", "iid"))
    p.add_argument("--root", default="", help="absolute path of an archive of images; without one: random images")
    p.add_argument("--nodes", type=int, nargs="*", default=[10, 2], help="virtual nodes of ours, one row each")
    p.add_argument("--precisions", nargs="*", default=["fp32", "bf16"], help="of ours")
    p.add_argument(
        "--stock-clients", type=int, help="clients of the stock run (default: all; each keeps as many images)"
    )
    p.add_argument("--no-stock", action="store_true")
    p.add_argument("--gpus", type=float, default=0.0, help="GPU fraction of a worker")
    p.add_argument("--pfl", default="", help="the Python that has pfl")
    return p


def candidates(options: argparse.Namespace, home: Path) -> dict[str, Callable[[], Rounds]]:
    """Give what is to be run, by the name of its row."""
    found: dict[str, Callable[[], Rounds]] = {}
    if not options.no_stock:
        found["stock Flower, fp32"] = lambda: stock_flower(options, home)
    for precision in options.precisions:
        for nodes in options.nodes:
            found[f"ours, {precision}, {nodes} nodes"] = lambda p=precision, n=nodes: ours(options, home, p, n)
    if options.pfl:
        found["pfl, fp32, 2 processes"] = lambda: pfl(options, home)
    return found


def overrides(options: argparse.Namespace, clients: int) -> str:
    """Give the settings of ours, which also say which images all train."""
    images = options.images * clients // options.clients
    source = f"data.name=folder data.root={options.root}" if options.root else "data.name=random"
    return (
        f"{source} data.limit={images} data.test_limit=100 data.image_size={options.image_size} clients={clients} "
        f"partition.kind={options.partition} model.width={options.width} train.batch_size={options.batch} "
        f"rounds={options.rounds + 1} evaluate_every=1000 window=32"
    )


def ours(options: argparse.Namespace, home: Path, precision: str, nodes: int) -> Rounds:
    """Run `simulations/scaling`; its last round, which evaluates, is not counted either."""
    name = f"{precision}-{nodes}"
    words = f"{overrides(options, options.clients)} run={name} train.precision={precision}"
    simulated(SCALING, f"overrides={json.dumps(words)}", nodes, options.gpus)
    rows = Run.opened(runs_folder(home) / name).metrics()[1:-1]
    seconds = [row["seconds"] for row in rows]
    idle = [row["seconds"] - row["train"]["busiest"] for row in rows]
    return Rounds(seconds, options.clients, rows[-1]["server_mebibytes"], idle)


def stock_flower(options: argparse.Namespace, home: Path) -> Rounds:
    """Run `benchmarks/stock_flower` on the same decoded images."""
    clients = options.stock_clients or options.clients
    dataset = open_dataset(compose(SCALING / "conf", overrides(options, clients)))
    result = home / "stock.json"
    settings = {"rounds": options.rounds, "clients": clients, "width": options.width, "batch": options.batch}
    words = [f'{name}="{value}"' for name, value in {"store": dataset.store, "result": result}.items()]
    words += [f'partition="{options.partition}"', *(f"{name}={value}" for name, value in settings.items())]
    simulated(HERE / "stock_flower", " ".join(words), clients, options.gpus)
    found = json.loads(result.read_text())
    return Rounds(found["seconds"][1:], clients, found["mebibytes"], [])


def simulated(app: Path, run_config: str, nodes: int, gpus: float) -> None:
    """Run a Flower app to its end on two workers of one CPU each, with a SuperLink of its own."""
    federation = (
        f"num-supernodes={nodes} init-args-num-cpus=2 client-resources-num-cpus=1 client-resources-num-gpus={gpus}"
    )
    with tempfile.TemporaryDirectory() as flower_home, superlink.superlink(Path(flower_home)) as environment:
        if superlink.run_app(app, run_config, federation, environment=environment):
            sys.exit(f"the run of {app.name} failed (see above)")


def pfl(options: argparse.Namespace, home: Path) -> Rounds:
    """Run `benchmarks/peer_pfl.py` in its own environment."""
    dataset = open_dataset(compose(SCALING / "conf", overrides(options, options.clients)))
    command = [str(Path(options.pfl).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command += [str(HERE / "peer_pfl.py"), "--data", str(dataset.store), "--image-size", str(options.image_size)]
    for name in ("clients", "rounds", "width", "images", "batch"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"pfl failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Rounds(found["seconds"][1:], options.clients, found["peak_rss_mib"], [])


if __name__ == "__main__":
    main()
