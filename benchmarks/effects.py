"""What settings that save time or bytes do to the result: `python -m benchmarks.effects`.

Every setting is run with several seeds beside the defaults, as `simulations/digits` with client 3 forgotten after round
20 of 30.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import timing
from fedunlearn.apps import simulate
from fedunlearn.runs.run import Run, runs_folder

APP = Path(__file__).parent.parent / "simulations" / "digits"
SETTINGS = ("", "wire=bf16", "unlearn.precision=bf16", "unlearn.share=0.2")
MEASURES = {
    "client 3 after": lambda request, last: request["after"]["forgotten"]["3"]["class"],
    "others after": lambda request, last: request["after"]["others"]["class"],
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
    options = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["FEDUNLEARN_HOME"] = home
        with simulate.superlink(Path(home) / "flower") as environment, open(os.devnull, "w") as nowhere:
            for setting in options.settings:
                results = [results_of(setting, seed, home, environment, nowhere) for seed in range(options.seeds)]
                rows.append(
                    [setting or "defaults", *(timing.mean_spread(values) for values in zip(*results, strict=True))]
                )
                print(*rows[-1], flush=True)
    timing.table(f"digits, {options.seeds} seeds: mean ± standard deviation", ("setting", *MEASURES), rows)


def results_of(setting: str, seed: int, home: str, environment: dict[str, str], nowhere) -> list[float]:
    """One run's measures."""
    name = f"{setting or 'defaults'}-{seed}".replace("=", "-")
    words = f"run={name} seed={seed} strategy=ssd unlearn.tune=fixed forget.schedule={{20:[3]}} {setting}"
    simulate.run(APP, words, "num-supernodes=2 client-resources-num-cpus=1", environment=environment, output=nowhere)
    metrics = Run.opened(runs_folder(Path(home)) / name).metrics()
    (request,) = (row for row in metrics if row["kind"] == "forget")
    return [measure(request, metrics[-1]) for measure in MEASURES.values()]


if __name__ == "__main__":
    main()
