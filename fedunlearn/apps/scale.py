"""What rounds and forget requests cost, by clients and workers: `python -m fedunlearn.scale clients=[10,100]`.

Every combination is one run of a Flower app, named by its settings: the same command again measures only what is
missing. CSV and plot are renewed after each run.
"""

import argparse
import csv
import hashlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedunlearn.apps import simulate
from fedunlearn.config import compose, state_home, to_json
from fedunlearn.errors import UserError
from fedunlearn.runs.run import Run, runs_folder


@dataclass
class Study:
    """The settings in `conf/study.yaml`, which says what they mean."""

    name: str = "scaling"
    clients: list[int] = field(default_factory=lambda: [10])
    actors: list[int] = field(default_factory=lambda: [1])
    cpus: int = 1
    gpus: list[float] = field(default_factory=lambda: [0.0])
    nodes: int = 10
    rounds: int = 4
    recipe_rounds: int = 200
    overrides: str = ""


@dataclass(frozen=True)
class Cell:
    """One combination."""

    clients: int
    actors: int
    gpus: float
    nodes: int

    def __str__(self) -> str:
        return f"{self.clients:,} clients on {self.nodes} nodes, {self.actors} actors, GPU share {self.gpus:g}"

    def overrides(self, study: Study) -> str:
        """Settings of its run, without a name: messages enough for all actors; client 0 is forgotten at the end."""
        return (
            f"window={max(8, 2 * self.actors)} {study.overrides} clients={self.clients} rounds={study.rounds} "
            f"evaluate_every={study.rounds} forget.schedule={{{study.rounds}:[0]}}"
        )

    def federation(self, study: Study) -> str:
        """The federation config; an existing Ray cluster has as many workers as its CPUs allow."""
        words = [f"num-supernodes={self.nodes}", f"client-resources-num-cpus={study.cpus}"]
        words.append(f"client-resources-num-gpus={self.gpus}")
        if not os.environ.get("RAY_ADDRESS"):
            words.append(f"init-args-num-cpus={self.actors * study.cpus}")
        return " ".join(words)

    def run_name(self, study: Study, app: Path) -> str:
        """The same for the same settings of the app and the same resources."""
        config = to_json(compose(app / "conf", self.overrides(study)))
        digest = hashlib.sha256(f"{config} {self.federation(study)}".encode()).hexdigest()
        return f"{study.name}-{self.clients}-clients-{self.actors}-actors-{digest[:8]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if everything was measured, 1 if a run failed, 2 for bad input."""
    p = argparse.ArgumentParser("python -m fedunlearn.scale", description="Measure rounds and forget requests.")
    p.add_argument("settings", nargs="*", help="of the study, as clients=[10,100] 'overrides=\"model.width=64\"'")
    p.add_argument(
        "--app", default="simulations/scaling", help="the Flower app's folder (default: simulations/scaling)"
    )
    p.add_argument("--home", default="", help="state folder (default: $FEDUNLEARN_HOME or ~/.fedunlearn)")
    options = p.parse_args(arguments)
    try:
        app, home = Path(options.app), state_home(options.home) / "scaling"
        study = load_study(app, options.settings)
        return measure_all(study, app, home)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def load_study(app: Path, settings: Iterable[str]) -> Study:
    """`conf/study.yaml` of the app with `settings` such as `clients=[10,100]`.

    Raises:
        UserError: no such file, an unknown name, a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    file = app / "conf" / "study.yaml"
    if not file.is_file():
        raise UserError(f"{file} does not exist: run from the repository, or name the app's folder with --app")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Study), OmegaConf.load(file), OmegaConf.from_dotlist([*settings]))
        study = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from None
    if study.rounds < 3:
        raise UserError(f"rounds={study.rounds}: the first and the last are not counted, so take 3 or more")
    for name in ("clients", "actors", "gpus"):
        if not getattr(study, name):
            raise UserError(f"{name}=[] leaves nothing to measure")
    return study


def cells(study: Study) -> list[Cell]:
    """All combinations, small ones first."""
    combinations = itertools.product(sorted(study.clients), sorted(study.actors), sorted(study.gpus))
    return [Cell(clients, actors, gpus, min(study.nodes, clients)) for clients, actors, gpus in combinations]


def measure_all(study: Study, app: Path, home: Path) -> int:
    """Run what is missing, and renew the results after each run."""
    folder, runs = home / study.name, {cell.run_name(study, app): cell for cell in cells(study)}
    missing = [name for name in runs if not is_done(home, name)]
    log(f"{len(runs)} runs, {len(runs) - len(missing)} of them measured already; results: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), 0
    with simulate.superlink(home / "flower") if missing else nullcontext({}) as environment:
        for i, name in enumerate(missing):
            left = f", about {(time.monotonic() - started) / i * (len(missing) - i):.0f} s left" if i else ""
            log(f"run {i + 1} of {len(missing)}: {runs[name]}{left}")
            failed += not measure(runs[name], name, study, app, home, environment)
            write(rows_of(runs, study, home), folder)
    rows = rows_of(runs, study, home)
    write(rows, folder)
    print_table(rows, study)
    return int(failed > 0)


def measure(cell: Cell, name: str, study: Study, app: Path, home: Path, environment: dict[str, str]) -> bool:
    """One run, its output in a log beside the results; says so where it fails."""
    output = home / study.name / f"{name}.log"
    with open(output, "a") as file:
        words = f"{cell.overrides(study)} run={name} home={home}"
        simulate.run(app, words, cell.federation(study), environment=environment, output=file)
    if is_done(home, name):
        return True
    log(f"this run failed; its output is in {output}, and the same command tries it again")
    return False


def rows_of(runs: dict[str, Cell], study: Study, home: Path) -> list[dict[str, Any]]:
    """What the finished runs have measured."""
    return with_efficiency([row_of(cell, name, study, home) for name, cell in runs.items() if is_done(home, name)])


def is_done(home: Path, name: str) -> bool:
    """Whether the run has trained all rounds and served its request."""
    folder = runs_folder(home) / name
    return (folder / "run.json").exists() and any(row["kind"] == "forget" for row in Run.opened(folder).metrics())


def row_of(cell: Cell, name: str, study: Study, home: Path) -> dict[str, Any]:
    """What a finished run has measured; times in seconds, memory in MiB."""
    metrics = Run.opened(runs_folder(home) / name).metrics()
    rounds = [row for row in metrics if row["kind"] == "round"][1:-1]
    (request,) = (row for row in metrics if row["kind"] == "forget")
    seconds = statistics.median(row["seconds"] for row in rounds)
    images, before = rounds[0]["examples"], request["before"]
    staying, leaving = before["others"]["examples"], before["forgotten"]["0"]["examples"]
    retraining = study.recipe_rounds * seconds * staying / (staying + leaving)
    return {
        **asdict(cell),
        "actors": rounds[-1]["train"]["workers"],
        "images": images,
        "round_seconds": seconds,
        "round_seconds_min": min(row["seconds"] for row in rounds),
        "round_seconds_max": max(row["seconds"] for row in rounds),
        "images_per_second": images / seconds,
        "overhead": statistics.median(1 - row["train"]["busiest"] / row["seconds"] for row in rounds),
        "server_mebibytes": rounds[-1]["server_mebibytes"],
        "worker_mebibytes": max((cost["worker_mebibytes"] for cost in request["costs"].values()), default=0.0),
        "round_bytes": rounds[-1]["train"]["bytes"],
        "request_seconds": request["seconds"],
        "request_bytes": sum(cost["bytes"] for cost in request["costs"].values()),
        "retraining_seconds": retraining,
        "retraining_over_request": retraining / request["seconds"],
    }


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds images/s an actor over images/s an actor of the fewest actors with as many clients and GPUs."""
    for row in rows:
        peers = [r for r in rows if (r["clients"], r["gpus"]) == (row["clients"], row["gpus"])]
        base = min(peers, key=lambda r: r["actors"])
        row["efficiency"] = row["images_per_second"] * base["actors"] / (row["actors"] * base["images_per_second"])
    return rows


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """`results.csv` and `scaling.svg`."""
    if not rows:
        return
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    figure(rows).savefig(folder / "scaling.svg")


def figure(rows: list[dict[str, Any]]) -> Any:
    """Images a second by actors, and a forget request beside a round and beside retraining."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 4), layout="constrained")
    speed, cost = drawing.subplots(1, 2)
    kinds = sorted({(row["clients"], row["gpus"]) for row in rows})
    for kind in kinds:
        own = sorted((r for r in rows if (r["clients"], r["gpus"]) == kind), key=lambda r: r["actors"])
        label = f"{kind[0]:,} clients" + (f", {kind[1]:g} GPU each" if kind[1] else "")
        (line,) = speed.plot([r["actors"] for r in own], [r["images_per_second"] for r in own], "o-", label=label)
        ideal = [own[0]["images_per_second"] * r["actors"] / own[0]["actors"] for r in own]
        speed.plot([r["actors"] for r in own], ideal, ":", color=line.get_color(), linewidth=1)
    speed.set(xlabel="actors (dotted: ideal)", ylabel="images trained a second", ylim=(0, None))
    speed.legend()
    parts = {"round_seconds": "one round", "request_seconds": "one forget request", "retraining_seconds": "retraining"}
    for shift, (name, label) in zip((-0.25, 0, 0.25), parts.items(), strict=True):
        cost.bar([i + shift for i in range(len(rows))], [row[name] for row in rows], 0.25, label=label)
    cost.set_xticks(range(len(rows)), [f"{row['clients']:,}\n{row['actors']} act." for row in rows])
    cost.set(yscale="log", ylabel="seconds", xlabel="clients, actors")
    cost.legend()
    return drawing


def print_table(rows: list[dict[str, Any]], study: Study) -> None:
    """The results, for a person."""
    columns = {
        "clients": "{clients:,}", "actors": "{actors}", "GPU": "{gpus:g}", "nodes": "{nodes}",
        "s a\nround": "{round_seconds:.2f}", "images/s": "{images_per_second:,.0f}", "efficiency": "{efficiency:.2f}",
        "overhead": "{overhead:.1%}",
        "server\nMiB": "{server_mebibytes:,.0f}", "worker\nMiB": "{worker_mebibytes:,.0f}",
        "request\ns": "{request_seconds:.1f}", "request\nMB": "{request_megabytes:,.1f}",
        "retraining\ns": "{retraining_seconds:,.0f}", "ratio": "{retraining_over_request:,.0f}",
    }  # fmt: skip
    table = Table(title=f"{study.name}: {study.overrides}", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        megabytes = row["request_bytes"] / 1e6
        table.add_row(*(text.format(**row, request_megabytes=megabytes) for text in columns.values()))
    Console(width=150).print(table)
    log(f"retraining: {study.recipe_rounds} rounds without the forgotten client, at the measured seconds a round")


def log(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
