"""The lines that a strategy logs: one a round, one a request."""

from typing import Any

from fedunlearn.runs.ledger import Request
from fedunlearn.runs.report import duration, gap


def progress(row: dict[str, Any], *, rounds: int, seconds_left: float) -> str:
    """How a round went: losses and accuracies of its training, of the test images where measured, and the time left."""
    trained = f"loss {row['loss']:.3f}  class {row['class_accuracy']:.3f}  client-ID {row['client_accuracy']:.3f}"
    tested = f"  test {row['test']['class']:.3f}" if "test" in row else ""
    times = f"{row['seconds']:.1f} s  {duration(seconds_left)} left"
    return f"round {row['round']:>3}/{rounds}  {trained}{tested}  {times}"


def forgotten(request: Request) -> str:
    """A completed request: who was forgotten, and what everybody's accuracy was before and is after."""
    before, after = request.detail["before"], request.detail["after"]
    clients = [
        f"client {c}: class {old['class']:.3f} → {new['class']:.3f} (memory gap {gap(old)} → {gap(new)}), "
        f"client-ID {old['client_id']:.3f} → {new['client_id']:.3f}"
        for c, old, new in ((c, old, after["forgotten"][c]) for c, old in before["forgotten"].items())
        if int(c) in request.clients
    ]
    rest = [f"{who} {before[who]['class']:.3f} → {after[who]['class']:.3f}" for who in ("others", "test")]
    where = f"forgotten after round {request.detail['round']} in {request.detail['seconds']:.1f} s"
    if "selected" in request.detail:
        where += f", {request.detail['selected']:.2%} of the weights dampened"
    return f"── request {request.id}, {where}  │  " + "  │  ".join([*clients, *rest])
