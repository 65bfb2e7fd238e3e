"""Log lines and numbers for people: one line a round, one a request."""

from collections.abc import Collection, Sequence
from typing import Any

from fedunlearn.naming import MOST_NAMED, named
from fedunlearn.runs.ledger import Request


def duration(seconds: float) -> str:
    """Say a duration in words.

    Example:
        >>> duration(75)
        '1 min 15 s'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def memorisation_gap(scores: dict[str, Any]) -> str:
    """Say how much higher a client's class accuracy is than that of held-out images of its class counts."""
    return f"{scores['class'] - scores['held_out']:+.3f}" if "held_out" in scores else ""


def progress(row: dict[str, Any], *, rounds: int, seconds_left: float) -> str:
    """Say how a round went: loss and accuracies of its training, the test accuracy where measured, the time left."""
    trained = f"loss {row['loss']:.3f}  class {row['class_accuracy']:.3f}  client-ID {row['client_accuracy']:.3f}"
    tested = f"  test {row['test']['class']:.3f}" if "test" in row else ""
    times = f"{row['seconds']:.1f} s  {duration(seconds_left)} left"
    return f"round {row['round']:>3}/{rounds}  {trained}{tested}  {times}"


def forgotten(request: Request, names: Sequence[str] = ()) -> str:
    """Say who was forgotten by a completed request, and all accuracies before and after."""
    before, after = request.detail["before"], request.detail["after"]
    clients = [
        f"{who}: class {old['class']:.3f} → {new['class']:.3f} "
        f"(memorisation gap {memorisation_gap(old)} → {memorisation_gap(new)}), "
        f"client-ID {old['client_id']:.3f} → {new['client_id']:.3f}"
        for who, old, new in _groups(request.detail, names, request.clients)
    ]
    rest = [
        f"{who} {before[key]['class']:.3f} → {after[key]['class']:.3f}"
        for who, key in (("retain clients", "retain"), ("test", "test"))
    ]
    where = f"forgotten after round {request.detail['round']} in {request.detail['seconds']:.1f} s"
    if "selected" in request.detail:
        where += f", {request.detail['selected']:.2%} of the weights dampened"
    return f"── request {request.id}, {where}  │  " + "  │  ".join([*clients, *rest])


def receipt(detail: dict[str, Any], names: Sequence[str] = ()) -> str:
    """Say in one line what is known of a request."""
    if "after" not in detail:
        return detail.get("reason", "")
    before, after = detail["before"], detail["after"]
    groups = _groups(detail, names, [int(client) for client in before["forgotten"]])
    groups += [(who, before[key], after[key]) for who, key in (("retain clients", "retain"), ("test", "test"))]
    return f"after round {detail['round']}; class accuracy " + ", ".join(
        f"{who} {old['class']:.3f} → {new['class']:.3f}{_gaps(old, new)}" for who, old, new in groups
    )


def _groups(
    detail: dict[str, Any], names: Sequence[str], clients: Collection[int]
) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name clients with their scores before and after: each, or where they are many all together."""
    before, after = ({int(c): s for c, s in detail[when]["forgotten"].items()} for when in ("before", "after"))
    known = [client for client in before if client in clients]
    groups = [known] if len(known) > MOST_NAMED + 1 else [[client] for client in known]
    return [(named(g, names), pooled([before[c] for c in g]), pooled([after[c] for c in g])) for g in groups]


def pooled(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Give the scores on the images of several clients together: means over images of what all of them have.

    Example:
        >>> pooled([{"examples": 1, "class": 0.0}, {"examples": 3, "class": 1.0}])
        {'class': 0.75, 'examples': 4}
    """
    examples = sum(one["examples"] for one in scores)
    measures = [name for name in scores[0] if name != "examples" and all(name in one for one in scores)]
    means = {name: sum(one[name] * one["examples"] for one in scores) / max(1, examples) for name in measures}
    return means | {"examples": examples}


def _gaps(old: dict[str, Any], new: dict[str, Any]) -> str:
    gap = memorisation_gap(old)
    return f" (memorisation gap {gap} → {memorisation_gap(new)})" if gap else ""
