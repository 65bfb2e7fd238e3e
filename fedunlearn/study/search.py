"""Optuna's search for alpha and lambda of one unlearning stage (paper, Section 5.1)."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.study.settings import Search

Trial = dict[str, Any]
"""`alpha`, `lambda_`, `value` (the objective), and what else the objective told."""


def search(
    settings: Search, objective: Callable[[float, float], tuple[float, dict]], *, file: Path, seed: int, tick: Callable
) -> list[Trial]:
    """Minimise `objective(alpha, lambda_) -> (value, details)` over log-uniform ranges by TPE.

    Trials are kept in `file`, one JSON line each. What is proposed depends on the seed and the trials before, so that
    an interrupted search continues to the same result.

    Args:
        tick: called with the number of finished trials after each.
    """
    import optuna

    logging.getLogger("optuna").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranges = {
        "alpha": optuna.distributions.FloatDistribution(settings.alpha_low, settings.alpha_high, log=True),
        "lambda_": optuna.distributions.FloatDistribution(settings.lambda_low, settings.lambda_high, log=True),
    }
    study = optuna.create_study(direction="minimize")
    trials = read_trials(file)[: settings.trials]
    for trial in trials:
        params = {name: trial[name] for name in ranges}
        study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=trial["value"]))
    file.write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    with open(file, "a") as lines:
        for number in range(len(trials), settings.trials):
            study.sampler = optuna.samplers.TPESampler(seed=1000 * seed + number)
            asked = study.ask(ranges)
            value, details = objective(**asked.params)
            study.tell(asked, value)
            trials.append({**asked.params, "value": value, **details})
            lines.write(json.dumps(trials[-1]) + "\n")
            lines.flush()
            tick(number + 1)
    return trials


def read_trials(file: Path) -> list[Trial]:
    """The finished trials; a last line that a crash cut short is passed over."""
    trials = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            trials.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The lowest value; the gentlest (largest alpha, then lambda) where several have it."""
    return min(trials, key=lambda trial: (trial["value"], -trial["alpha"], -trial["lambda_"]))
