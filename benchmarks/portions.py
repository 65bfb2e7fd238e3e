"""Requests by class, by patient and by image beside retrained models: `python -m benchmarks.portions --folder F`.

A federation trains once. Then every request is applied to copies of it, by each strategy, and training carries on. A
retrained model begins anew without what the request names (`strategy=retrain`), another one does so with other random
draws. What is there in the folder already is not computed again.
"""

import argparse
import logging
import statistics
from collections.abc import Iterable, Iterator
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import timing
from fedunlearn.apps import client_app
from fedunlearn.apps.server_app import train
from fedunlearn.composing import compose
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.federation.client import ClientRuntime
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.runs.home import file_first
from fedunlearn.runs.run import Run

SIMULATIONS = Path(__file__).parent.parent / "simulations"
STRATEGIES = ("subset", "leave", "retrain")
ANOTHER = "another retrain"
AFTER = (0, 10)  # rounds after the request
OTHERS = (("retain", "class"), ("test", "class"), ("retain", "client_id"))


class Asked(NamedTuple):
    """What is asked for, in words, of which clients (none: of all), and which of their images."""

    what: str
    clients: list[int]
    selection: Selection


def main() -> None:
    """Print one table, a line a request, a moment and a model: means over the seeds, and their standard deviation."""
    p = argparse.ArgumentParser("python -m benchmarks.portions", description=__doc__)
    p.add_argument("--folder", type=Path, required=True, help="where runs are kept")
    p.add_argument("--app", default="digits", help="digits, cifar10 or cifar100")
    p.add_argument("--rounds", type=int, default=20, help="before the request")
    p.add_argument("--client", type=int, default=0, help="who is asked to forget a class or images")
    p.add_argument("--images", type=int, default=20, help="of the client that are named one by one")
    p.add_argument("--class", dest="class_", type=int, default=5, help="that all clients forget")
    p.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the federations, each in a folder of its own")
    p.add_argument("--patients", nargs="*", default=[], help="that all their clients forget")
    p.add_argument("words", nargs="*", help="settings, as data.limit=5000")
    options = p.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found: dict[tuple[str, str, int], list[list[float]]] = {}
    for seed in options.seeds:
        home, words = options.folder.absolute() / str(seed), [*options.words, f"seed={seed}"]
        bench = Bench(home, SIMULATIONS / options.app / "conf", options.rounds, words)
        bench.trained("base", options.rounds)
        for asked in bench.requests(options.client, options.images, options.class_, options.patients):
            for model in (*STRATEGIES, ANOTHER):
                for after, figures in bench.rows(asked, model):
                    found.setdefault((asked.what, model, after), []).append(figures)
    columns = ("request", "model", "rounds", "seeds", "images", "forgotten", "gap", "retain", "test", "client ID")
    rows = [[what, model, after, len(seeds), *over_seeds(seeds)] for (what, model, after), seeds in found.items()]
    timing.table(f"{options.app}, after {options.rounds} rounds of training", columns, rows)


class Bench:
    """Trains, asks and measures in a state folder."""

    def __init__(self, home: Path, conf: Path, rounds: int, words: Iterable[str]) -> None:
        self._home, self._conf, self._rounds, self._words = home, conf, rounds, list(words)

    def trained(self, name: str, rounds: int, *words: str) -> Run:
        """Give a run that has trained so many rounds, at least."""
        given = [*self._words, f"home={self._home}", f"run={name}", f"rounds={rounds}", *words]
        given += [f"train.schedule_rounds={self._rounds}", f"evaluate_every={gcd(self._rounds, *AFTER)}"]
        config = compose(self._conf, given)
        try:
            train(LocalGrid(config.clients, client_app.app), config, given)
        except UserError as error:
            if not (self._home / "runs" / name / "run.json").exists():
                raise
            print(f"{name}: {error}")
        return Run.opened(self._home / "runs" / name)

    def requests(self, client: int, images: int, class_: int, patients: list[str]) -> Iterator[Asked]:
        """Give the requests that are tried."""
        base = Run.opened(self._home / "runs" / "base")
        runtime = ClientRuntime(base.config_here())
        own, train_ = runtime.slices[client], runtime.dataset.train
        largest = int(np.bincount(train_.labels[own]).argmax())
        names = runtime.dataset.names_of(np.random.default_rng(0).choice(own, images, replace=False))
        yield Asked(f"class {largest} of client {client}", [client], Selection.by(classes=[largest]))
        yield Asked(f"{images} images of client {client}", [client], Selection.by(examples=names))
        yield Asked(f"class {class_} of all clients", [], Selection.by(classes=[class_]))
        if patients:
            yield Asked(f"{len(patients)} patients", [], Selection.by(patients=patients))

    def rows(self, asked: Asked, model: str) -> Iterator[tuple[int, list[float]]]:
        """Ask a copy of the base, train on, and give each moment with its figures."""
        name = f"{asked.what} {model}".replace(" ", "-")
        last = self._rounds + max(AFTER)
        if model == ANOTHER:
            self._file_first(name, asked)
            other = Run.opened(self._home / "runs" / "base").config.seed + 1
            run = self.trained(name, last, "strategy=leave", f"seed={other}")
        else:
            if not (self._home / "runs" / name).exists():
                self.trained(name, self._rounds, "fork=base", f"strategy={model}").request(
                    asked.clients, selection=asked.selection
                )
            run = self.trained(name, last, f"strategy={model}")
        (request,) = run.ledger.requests()
        for after in AFTER:
            if scores := scores_of(run, request.detail, self._rounds + after, at_once=not after and model != ANOTHER):
                yield after, figures(scores, request.clients)

    def _file_first(self, name: str, asked: Asked) -> None:
        """File the request before the run exists: then what it names is never trained on."""
        folder, base = self._home / "runs" / name, Run.opened(self._home / "runs" / "base")
        if not folder.exists():
            clients, every = base.config.clients, not asked.clients
            owners = range(clients) if every else asked.clients
            file_first(folder, owners, asked.selection, clients=clients, all_clients=every)


def scores_of(run: Run, detail: dict[str, Any], round_: int, *, at_once: bool) -> dict[str, Any] | None:
    """Give what was measured after a round; `at_once` what was when the request was completed."""
    if at_once:
        return detail.get("after")
    return next((row for row in run.metrics() if row["kind"] == "round" and row["round"] == round_), None)


def figures(scores: dict[str, Any], portions: list[int]) -> list[float]:
    """Give images, accuracy and memorisation gap of the portions together, and the others' accuracies."""
    each = [scores["forgotten"][str(portion)] for portion in portions if str(portion) in scores["forgotten"]]
    examples = sum(one["examples"] for one in each)
    own, held_out = (sum(one[kind] * one["examples"] for one in each) / examples for kind in ("class", "held_out"))
    return [examples, own, own - held_out, *(scores[who][of] for who, of in OTHERS)]


def over_seeds(seeds: list[list[float]]) -> list[str]:
    """Give the figures' means as words, with standard deviations where there are several seeds."""
    images, *means = (statistics.mean(values) for values in zip(*seeds, strict=True))
    if len(seeds) == 1:
        return [f"{images:.0f}", *(f"{value:.3f}" for value in means)]
    deviations = [statistics.stdev(values) for values in zip(*seeds, strict=True)][1:]
    return [f"{images:.0f}", *(f"{m:.3f} ± {d:.3f}" for m, d in zip(means, deviations, strict=True))]


if __name__ == "__main__":
    main()
