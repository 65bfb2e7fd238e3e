"""What settings that save time or bytes do to the result: `python -m benchmarks.effects`.

Every setting is run with several seeds beside the defaults, as `simulations/digits` with client 3 forgotten after round
20 of 30.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import timing
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.run import Run
from fedunlearn.words import split_words

SETTINGS = ("", "message_dtype=bf16", "unlearn.precision=bf16", "unlearn.retain_fraction=0.2")
MEASURES = {
    "client 3 after": lambda request, last: request["after"]["forgotten"]["3"]["class"],
    "retain clients after": lambda request, last: request["after"]["retain"]["class"],
    "test after": lambda request, last: request["after"]["test"]["class"],
    "client 3 at the end": lambda request, last: last["forgotten"]["3"]["class"],
    "test at the end": lambda request, last: last["test"]["class"],
    "% dampened": lambda request, last: 100 * request["selected"],
}


def main() -> None:
    """Print one table: means and standard deviations over seeds."""
    p = argparse.ArgumentParser("python -m benchmarks.effects", description=__doc__)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--settings", nargs="*", default=SETTINGS)
    p.add_argument("--engine", default="ray", help="as of `fedunlearn run`: ray, or local without worker processes")
    options = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        for setting in options.settings:
            results = [results_of(setting, seed, Path(home), options.engine) for seed in range(options.seeds)]
            rows.append([setting or "defaults", *(timing.mean_spread(v) for v in zip(*results, strict=True))])
            print(*rows[-1], flush=True)
    timing.table(f"digits, {options.seeds} seeds: mean ± standard deviation", ("setting", *MEASURES), rows)


def results_of(setting: str, seed: int, home: Path, engine: str) -> list[float]:
    """Run once, on two nodes, and give its measures."""
    name = f"{setting or 'defaults'}-{seed}".replace("=", "-").replace(" ", "-")
    words = [f"run={name}", f"home={home}", f"seed={seed}", "strategy=ssd", "unlearn.tune=fixed", "forget.gate=false"]
    words += ["forget.schedule={20:[3]}", *split_words(setting)]
    command = [sys.executable, "-m", "fedunlearn", "run", "digits", *words, "--nodes", "2", "--workers", "2"]
    done = subprocess.run([*command, "--engine", engine], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run {name} failed: {done.stderr[-2000:]}")
    metrics = Run.opened(runs_folder(home) / name).metrics()
    request: dict[str, Any]
    (request,) = (row for row in metrics if row["kind"] == "forget")
    return [measure(request, metrics[-1]) for measure in MEASURES.values()]


if __name__ == "__main__":
    main()
