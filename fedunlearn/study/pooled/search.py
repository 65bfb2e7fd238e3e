"""A search by Optuna for the strength of one unlearning stage (paper, Section 5.1)."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.runs.files import write_atomically

Trial = dict[str, Any]
"""The parameters by name, `value` (the objective), and what else the objective told."""


def search(
    ranges: Mapping[str, tuple[float, float]],
    objective: Callable[..., tuple[float, dict]],
    *,
    trials: int,
    file: Path,
    seed: int,
    tick: Callable[[int], None],
) -> list[Trial]:
    """Minimise `objective(**parameters) -> (value, details)` over log-uniform ranges by TPE.

    Trials are kept in `file`, one JSON line each. What is proposed depends on the seed and the trials before, so that
    an interrupted search continues to the same result.

    Args:
        ranges: lowest and highest value by parameter.
        tick: called with the number of finished trials after each.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.FloatDistribution(*ends, log=True) for name, ends in ranges.items()
    }
    study, found = optuna.create_study(direction="minimize"), read_trials(file)
    for trial in found:
        params = {name: trial[name] for name in space}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=trial["value"]))
    write_atomically(file, "".join(json.dumps(trial) + "\n" for trial in found).encode())  # without a line cut short
    with open(file, "a") as lines:
        for number in range(len(found), trials):
            study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + number)
            asked = study.ask(space)
            value, details = objective(**asked.params)
            study.tell(asked, value)
            found.append({**asked.params, "value": value, **details})
            lines.write(json.dumps(found[-1]) + "\n")
            lines.flush()
            tick(number + 1)
    return found


def read_trials(file: Path) -> list[Trial]:
    """Read the finished trials; a last line that a crash cut short is passed over."""
    trials = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            trials.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """Choose the trial of the lowest value.

    Of several it is the gentlest: the largest threshold (or smallest exponent), then the largest lambda.
    """

    def order(trial: Trial) -> tuple[float, ...]:
        return trial["value"], -trial.get("alpha", 0.0), trial.get("exponent", 0.0), -trial["lambda_"]

    return min(trials, key=order)
