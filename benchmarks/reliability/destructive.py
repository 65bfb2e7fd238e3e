"""Forget requests that would destroy the model: `python -m benchmarks.reliability.destructive`.

A federation of digits (600 images, width 8, four clients on four nodes) trains 8 rounds of three epochs. Each row goes
on from there: client 3 asks to be forgotten, with other settings, or while a client sends something else. Client 3 is
not memorised yet; relabelling is made to take it for memorised, or it would do nothing.

A model is destroyed if it is not finite, or if its accuracy on held-out images or on the retain clients' is more than
`forget.budget` below the one before. This is measured here, whatever the gate says.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from benchmarks import timing
from benchmarks.reliability.kill_points import draw_nothing
from benchmarks.reliability.lying import Lie, LyingGrid
from fedunlearn.apps.server_app import server_app
from fedunlearn.apps.simulate import app_folder
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.nn.evaluate import Counts
from fedunlearn.runs.home import runs_folder
from fedunlearn.runs.ledger import Request, State
from fedunlearn.runs.run import Run
from strategies import relabel

ROUNDS, FORGET_CLIENT, RETAIN_CLIENT = 8, 3, 1  # the forget client is the last one
SMALL = f"data.limit=600 clients=4 model.width=8 rounds={ROUNDS} train.epochs=3 evaluate_every={ROUNDS}"
SMALL += " train.precision=fp32 message_dtype=fp32"
SETTINGS = {
    "ssd": [
        "unlearn.tune=fixed unlearn.alpha=0.01 unlearn.lambda_=0",
        "unlearn.tune=fixed unlearn.alpha=0.01 unlearn.exponent=100",
        "unlearn.tune=fixed unlearn.alpha=0 unlearn.lambda_=0",
        "unlearn.exponent=100",
        "unlearn.temperature=1000000",
        "unlearn.tune=fixed unlearn.alpha=3.99",
    ],
    "subset": [
        "unlearn.lr=1",
        "unlearn.lr=100",
        "unlearn.repair_lr=2",
        "unlearn.ridge=1e9",
        "unlearn.ridge=0.00001 unlearn.output_ridge=0.00001",
        "unlearn.epsilon=1000000 unlearn.lambda_=0",
    ],
    "relabel": ["unlearn.lr=0.3", "unlearn.lr=10", "unlearn.repair_lr=2", "unlearn.epochs=100 unlearn.lr=1"],
    "gradients": ["unlearn.lr=100", "unlearn.ridge=0.00001", "unlearn.repair_lr=2"],
    "ascent": ["unlearn.lr=5", "unlearn.lr=5 unlearn.repair_rounds=0", "unlearn.clip=1e9", "unlearn.repair_lr=5"],
    "pga": ["unlearn.lr=100 unlearn.clip=1e9", "unlearn.lr=5 unlearn.repair_rounds=0", "unlearn.repair_lr=5"],
    "negate": ["unlearn.repair_rounds=0", "unlearn.repair_lr=5", "unlearn.repair_rounds=1 unlearn.repair_lr=0"],
    "federaser": ["unlearn.every=8", "unlearn.calibration_fraction=0.000001"],
    "retrain": [""],
    "leave": [""],
}
TAUGHT = {"subset": "relabel", "relabel": "relabel", "gradients": "gradient", "ascent": "climb", "pga": "climb"}
REPAIRED = {"subset": "repair", "relabel": "repair", "ascent": "train", "negate": "train", "retrain": "train"}
LIES: dict[str, Callable[[Tensor], Tensor]] = {
    "x -10": lambda value: -10 * value,
    "x 10": lambda value: 10 * value,
    "x 1000": lambda value: 1000 * value,
    "noise": lambda value: 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)),
    "ones": torch.ones_like,
    "nothing": torch.zeros_like,
}
COLUMNS = ("strategy", "what is done", "state", "held-out", "retain", "weights", "named", "destroyed", "reason")


class Named(logging.Handler):
    """Collects whom the log names."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line about a node."""
        if "is left out" in record.getMessage() or "refused" in record.getMessage():
            self.lines.append(record.getMessage())


def main() -> None:
    """Print one table, a row for each request."""
    p = argparse.ArgumentParser("python -m benchmarks.reliability.destructive", description=__doc__)
    p.add_argument("--strategies", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    options = p.parse_args()
    draw_nothing()
    found = rows(options.strategies)
    timing.table("requests that would destroy the model", COLUMNS, found, width=200)
    print(f"{len(found)} requests, destroyed models applied: {sum(row[-2] == 'yes' for row in found)}")


def rows(strategies: Iterable[str]) -> list[list[str]]:
    """Try everything on some strategies; gives a row for each request."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        relabel.is_known_better = lambda *found: True
        train(f"{SMALL} strategy=federaser run=base home={home}", None)
        for strategy in strategies:
            for words in SETTINGS[strategy]:
                found.append(row(home, strategy, f"{words or 'defaults'}", words, None))
            for lie in lies_about(strategy):
                who = "the forget client" if lie.client == FORGET_CLIENT else "a retain client"
                found.append(row(home, strategy, f"{who} sends {lie.name} ({lie.task})", "", lie))
    return found


def lies_about(strategy: str) -> list[Lie]:
    """Give what clients may send to this strategy's requests."""
    taught, repaired = TAUGHT.get(strategy), REPAIRED.get(strategy)
    lies = [Lie(taught, FORGET_CLIENT, name, LIES[name]) for name in LIES] if taught in ("relabel", "climb") else []
    return lies + ([Lie(repaired, RETAIN_CLIENT, name, LIES[name]) for name in ("x 1000", "x -10")] if repaired else [])


def row(home: Path, strategy: str, what: str, words: str, lie: Lie | None) -> list[str]:
    """Let a request be served, and say what became of the model."""
    name = f"try-{len(list(runs_folder(home).iterdir()))}"
    about = f"fork=base run={name} home={home} strategy={strategy} {words}"
    named = train(f"{about} forget.schedule={{{ROUNDS}:[{FORGET_CLIENT}]}}", lie)
    base, run = Run.opened(runs_folder(home) / "base"), Run.opened(runs_folder(home) / name)
    try:
        (request,) = run.ledger.requests()
        before, after = accuracies(base), accuracies(run)
        is_taken = request.state == State.COMPLETED
        same = same_weights(base, run)
        lost = max(old - new for old, new in zip(before, after, strict=True))
        is_destroyed = is_taken and not lost <= run.config.forget.budget
        cells = [f"{old:.3f} -> {new:.3f}" for old, new in zip(before, after, strict=True)]
        weights = "the same" if same else "others" if is_taken else "OTHERS"
        line = [strategy, what, str(request.state), *cells, weights, named, "yes" if is_destroyed else "no"]
        print(*line, reason(request), sep=" | ", flush=True)
        return [*line, reason(request)]
    finally:
        base.ledger.close()
        run.ledger.close()


def train(words: str, lie: Lie | None) -> str:
    """Train a run and serve its requests; gives whom the log names."""
    log, named = logging.getLogger("fedunlearn"), Named()
    log.addHandler(named)
    try:
        with suppress(UserError):  # the request was set aside
            context = Context(1, 1, {}, RecordDict(), {"overrides": words})
            server_app(app_folder("digits") / "conf")(LyingGrid(lie), context)
    finally:
        log.removeHandler(named)
    return "; ".join(sorted({line.split("(clients ")[-1].split(")")[0] for line in named.lines})) or "nobody"


def accuracies(run: Run) -> list[float]:
    """Measure the current model on held-out images, and on those of the retain clients."""
    server, auditor = ServerData(run.config), Auditor(run.config)
    run.restore(server.model, beside=None)
    if not all(bool(value.isfinite().all()) for value in server.model.state_dict().values()):
        return [float("-inf")] * 2
    held_out = server.predict(server.model).total
    retain = sum((auditor.evaluate(server.model.state_dict(), client) for client in range(FORGET_CLIENT)), Counts())
    return [held_out.class_accuracy, retain.class_accuracy]


def same_weights(base: Run, run: Run) -> bool:
    """Say whether two runs have the same model, bit for bit."""
    one, other = (
        ServerState.from_tensors(*of.restore(ServerData(of.config).model, beside=None)).params for of in (base, run)
    )
    return all(torch.equal(value, other[name]) for name, value in one.items())


def reason(request: Request) -> str:
    """Say why a request was set aside."""
    return "" if request.state == State.COMPLETED else str(request.detail.get("reason", ""))


if __name__ == "__main__":
    main()
