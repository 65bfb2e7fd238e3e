"""What rounds and forget requests cost, by clients and workers: `fedunlearn scale clients=[10,100]`.

Every combination is one run of a Flower app in a process of its own, named by its settings: the same command again
measures only what is missing. CSV and plot are renewed after each run.
"""

import csv
import hashlib
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from fedunlearn.composing import compose
from fedunlearn.config import Settings, to_json
from fedunlearn.errors import UserError
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.run import Run
from fedunlearn.schema import check_names, validated
from fedunlearn.words import split_words

log = getLogger("fedunlearn")


class ScalingStudy(Settings):
    """The settings in `conf/study.yaml` of an app."""

    name: str = Field(default="scaling", description="of the results' folder")
    clients: list[int] = Field(default=[10], min_length=1, description="numbers of clients")
    actors: list[int] = Field(default=[1], min_length=1, description="numbers of Ray actors")
    cpus: int = Field(default=1, ge=1, description="of an actor")
    gpus: list[float] = Field(default=[0.0], min_length=1, description="GPU fractions of an actor")
    nodes: int = Field(default=10, ge=1, description="virtual nodes, at most one a client")
    rounds: int = Field(default=4, ge=3, description="of a run; the first and the last are not counted")
    recipe_rounds: int = Field(default=200, ge=1, description="that retraining would take")
    overrides: str = Field(default="", description="settings of every run")


@dataclass(frozen=True)
class Cell:
    """One combination."""

    clients: int
    actors: int
    gpus: float
    nodes: int

    def __str__(self) -> str:
        return f"{self.clients:,} clients on {self.nodes} nodes, {self.actors} actors, GPU fraction {self.gpus:g}"

    def words(self, study: ScalingStudy) -> list[str]:
        """Give the settings of its run: messages enough for all actors; client 0 is forgotten at the end."""
        return [
            f"window={max(8, 2 * self.actors)}",
            *split_words(study.overrides),
            f"clients={self.clients}",
            f"rounds={study.rounds}",
            f"evaluate_every={study.rounds}",
            f"forget.schedule={{{study.rounds}:[0]}}",
            "forget.purge=never",  # the next run has the same client
            "readmit=[0]",
        ]

    def resources(self, study: ScalingStudy) -> list[str]:
        """Give the options of its run; an existing Ray cluster has as many workers as its CPUs allow."""
        options = [f"--nodes={self.nodes}", f"--cpus={study.cpus}", f"--gpus={self.gpus}"]
        return options if os.environ.get("RAY_ADDRESS") else [*options, f"--workers={self.actors}"]

    def run_name(self, study: ScalingStudy, app: Path) -> str:
        """Name the run: the same for the same settings of the app and the same resources."""
        config = to_json(compose(app / "conf", self.words(study)))
        digest = hashlib.sha256(f"{config} {self.resources(study)}".encode()).hexdigest()
        return f"{study.name}-{self.clients}-clients-{self.actors}-actors-{digest[:8]}"


def load_study(app: Path, words: Iterable[str]) -> ScalingStudy:
    """Read `conf/study.yaml` of the app, with settings such as `clients=[10,100]` on top.

    Raises:
        UserError: no such file, an unknown name, a value of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file, words = app / "conf" / "study.yaml", list(words)
    if not file.is_file():
        raise UserError(f"{file} does not exist: name an app with a study, such as scaling, with --app")
    check_names(words, ScalingStudy)
    try:
        values = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(file), OmegaConf.from_dotlist(words)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{' '.join(words)}: {str(error).splitlines()[0]}") from None
    return validated(ScalingStudy, values)


def cells(study: ScalingStudy) -> list[Cell]:
    """All combinations, small ones first."""
    combinations = itertools.product(sorted(study.clients), sorted(study.actors), sorted(study.gpus))
    return [Cell(clients, actors, gpus, min(study.nodes, clients)) for clients, actors, gpus in combinations]


def measure_all(study: ScalingStudy, app: Path, home: Path) -> int:
    """Run what is missing, and renew the results after each run; gives 1 if a run failed."""
    folder, runs = home / study.name, {cell.run_name(study, app): cell for cell in cells(study)}
    missing = [name for name in runs if not is_done(home, name)]
    log.info("%d runs, %d of them measured already; results: %s", len(runs), len(runs) - len(missing), folder)
    folder.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), 0
    for i, name in enumerate(missing):
        left = f", about {(time.monotonic() - started) / i * (len(missing) - i):.0f} s left" if i else ""
        log.info("run %d of %d: %s%s", i + 1, len(missing), runs[name], left)
        failed += not measure(runs[name], name, study, app, home)
        write(rows_of(runs, study, home), folder)
    rows = rows_of(runs, study, home)
    write(rows, folder)
    print_table(rows, study)
    return int(failed > 0)


def measure(cell: Cell, name: str, study: ScalingStudy, app: Path, home: Path) -> bool:
    """Do one run in a process of its own, its output in a log beside the results; say so where it fails."""
    output = home / study.name / f"{name}.log"
    command = [sys.executable, "-m", "fedunlearn", "run", str(app), *cell.resources(study)]
    with open(output, "a") as file:
        subprocess.run([*command, *cell.words(study), f"run={name}", f"home={home}"], stdout=file, stderr=file)
    if is_done(home, name):
        return True
    log.error("this run failed; its output is in %s, and the same command tries it again", output)
    return False


def rows_of(runs: dict[str, Cell], study: ScalingStudy, home: Path) -> list[dict[str, Any]]:
    """What the finished runs have measured."""
    return with_efficiency([row_of(cell, name, study, home) for name, cell in runs.items() if is_done(home, name)])


def is_done(home: Path, name: str) -> bool:
    """Say whether the run has trained all rounds and applied its request."""
    folder = runs_folder(home) / name
    return (folder / "run.json").exists() and any(row["kind"] == "forget" for row in Run.opened(folder).metrics())


def row_of(cell: Cell, name: str, study: ScalingStudy, home: Path) -> dict[str, Any]:
    """What a finished run has measured; times in seconds, memory in MiB."""
    metrics = Run.opened(runs_folder(home) / name).metrics()
    rounds = [row for row in metrics if row["kind"] == "round"][1:-1]
    (request,) = (row for row in metrics if row["kind"] == "forget")
    seconds = statistics.median(row["seconds"] for row in rounds)
    images, before = rounds[0]["examples"], request["before"]
    retain, forgotten = before["retain"]["examples"], before["forgotten"]["0"]["examples"]
    retraining = study.recipe_rounds * seconds * retain / (retain + forgotten)
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
    above: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3, "fontsize": 8}
    kinds = sorted({(row["clients"], row["gpus"]) for row in rows})
    for kind in kinds:
        own = sorted((r for r in rows if (r["clients"], r["gpus"]) == kind), key=lambda r: r["actors"])
        label = f"{kind[0]:,} clients" + (f", {kind[1]:g} GPU each" if kind[1] else "")
        (line,) = speed.plot([r["actors"] for r in own], [r["images_per_second"] for r in own], "o-", label=label)
        ideal = [own[0]["images_per_second"] * r["actors"] / own[0]["actors"] for r in own]
        speed.plot([r["actors"] for r in own], ideal, ":", color=line.get_color(), linewidth=1)
    speed.set(xlabel="actors (dotted: ideal)", ylabel="images trained a second", ylim=(0, None))
    speed.legend(**above)
    parts = {"round_seconds": "one round", "request_seconds": "one forget request", "retraining_seconds": "retraining"}
    for shift, (name, label) in zip((-0.25, 0, 0.25), parts.items(), strict=True):
        cost.bar([i + shift for i in range(len(rows))], [row[name] for row in rows], 0.25, label=label)
    cost.set_xticks(range(len(rows)), [f"{row['clients']:,}\n{row['actors']} act." for row in rows])
    cost.set(yscale="log", ylabel="seconds", xlabel="clients, actors")
    cost.legend(**above)
    return drawing


def print_table(rows: list[dict[str, Any]], study: ScalingStudy) -> None:
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
    log.info(f"retraining: {study.recipe_rounds} rounds without the forgotten client, at the measured seconds a round")
