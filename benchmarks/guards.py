"""What it costs to look at replies, rounds and requests before they count: `python -m benchmarks.guards`.

A federation of random images trains in this process, and forgets a client after the last round. Runs with and without
the guards take turns. Without them no size is compared, no held-out loss is measured, and no model passes the gate.
"""

import argparse
import itertools
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median

from flwr.app import Context, RecordDict

from benchmarks import timing
from fedunlearn.apps.client_app import app
from fedunlearn.apps.server_app import server_app
from fedunlearn.apps.simulate import app_folder
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.ledger import State
from fedunlearn.runs.run import Run

WITHOUT = "reply_band=0 statistics_band=0 round_band=0 forget.gate=false"


def main() -> None:
    """Print one table."""
    p = argparse.ArgumentParser("python -m benchmarks.guards", description=__doc__)
    p.add_argument("--clients", type=int, default=10)
    p.add_argument("--images", type=int, default=1000)
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--rounds", type=int, default=4, help="of which the first is not counted")
    p.add_argument("--strategies", nargs="*", default=["ssd", "subset"])
    p.add_argument("--repeats", type=int, default=3)
    options = p.parse_args()
    rows = [row for strategy in options.strategies for row in measured(strategy, options)]
    title = f"width {options.width}, {options.images} images, {options.clients} clients, {options.repeats} runs each"
    timing.table(title, ("seconds of", "with guards", "min", "max", "without", "min", "max", "ratio"), rows)


def measured(strategy: str, options: argparse.Namespace) -> list[list[str]]:
    """Give the rows of a round and of a request."""
    found: dict[str, list[tuple[float, float]]] = {"": [], WITHOUT: []}
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as home:
        for _ in range(options.repeats):
            for words in found:
                found[words].append(timed(f"{words} strategy={strategy} run=r{next(numbers)}", Path(home), options))
    rows = []
    for place, name in enumerate(("a round", f"a request, {strategy}")):
        guarded, bare = ([both[place] for both in runs] for runs in found.values())
        rows.append([name, *timing.spread(guarded), *timing.spread(bare), timing.ratio(guarded, bare)])
    return rows


def timed(words: str, home: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Run a federation, and give the seconds of a round (the median) and of the request."""
    small = f"data.name=random data.limit={options.images} data.test_limit=200 clients={options.clients} "
    small += f"model.width={options.width} rounds={options.rounds} train.threads=1 evaluate_every=1000 "
    small += f"forget.schedule={{{options.rounds}:[1]}} home={home} "
    grid = LocalGrid(options.clients, app)
    server_app(app_folder("scaling") / "conf")(grid, Context(1, 1, {}, RecordDict(), {"overrides": small + words}))
    run = Run.opened(next(folder for folder in runs_folder(home).iterdir() if f"run={folder.name}" in words.split()))
    try:
        steps = {event["state"]: event["at"] for event in run.ledger.events() if "state" in event}
        begun, ended = (datetime.fromisoformat(steps[state]) for state in (State.COLLECTING, State.COMPLETED))
        rounds = [row["seconds"] for row in run.metrics() if row["kind"] == "round"][1:]
        return median(rounds), (ended - begun).total_seconds()
    finally:
        run.ledger.close()


if __name__ == "__main__":
    main()
