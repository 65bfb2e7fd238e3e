"""The states of a request in words, with their times."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedunlearn.errors import printable
from fedunlearn.naming import as_command
from fedunlearn.runs.hints import of_run
from fedunlearn.runs.ledger import VOID, Request, State

ABOUT_STATES = {
    State.RECEIVED: "the request is in the ledger",
    State.COLLECTING: "the strategy is at work; no client of the request trains from here on",
    State.APPLIED: "the new model has replaced the older one",
    State.RECOVERING: "the retain clients train on",
    State.COMPLETED: "accuracies were measured",
    State.CANCELLED: "taken back before anything was done",
}


def timeline(request: Request, events: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """List the states of a request as (state, time, remark)."""
    found = []
    for event in events:
        if event.get("request") == request.id:
            found.append((event["state"], readable(event["at"]), _remark(event)))
    return found


def _remark(event: Mapping[str, Any]) -> str:
    if "accepted_by" in event:
        return f"made again and to be taken whatever the gate finds; {printable(event['accepted_by'])} answers for it"
    attempt = f"attempt {event['attempts']}: " if "attempts" in event else ""
    return attempt + event.get("reason", "") or ABOUT_STATES.get(event["state"], "")


def what_follows(request: Request, folder: Path, later: Sequence[Request] = ()) -> str:
    """Say what happens next to a request that was set aside, refused, taken back or applied; nothing for others.

    Args:
        request: as it stands.
        folder: the run's.
        later: requests that cover the same clients, and are not void.
    """
    several = len(request.clients) > 1
    if request.state in VOID and later:
        return f"Request {later[0].id} has taken its place, and is {later[0].state}."
    if request.state == State.QUARANTINED:
        whole = "Its clients stay" if several else "Its client stays"
        out = f"{'Its images stay' if request.portions else whole} out of training. You may ask again"
        command = as_command("forget", f"--accept={request.id}", "--by=NAME", *of_run(folder))
        taken = f": `{command}` takes its model all the same"
        return f"{out}, or answer for it by name{taken}." if "gate" in request.detail else f"{out}."
    if request.state == State.REFUSED:
        command = as_command("forget", f"--cancel={request.id}", *of_run(folder))
        return f"Nothing has changed. You may ask again, or take it back: `{command}`."
    if request.state == State.CANCELLED:
        return "Nothing has changed. You may ask again."
    if request.state in (State.APPLIED, State.RECOVERING):
        return f"The retain clients train on. The request is completed after round {request.detail['completes_at']}."
    return ""


def readable(at: str) -> str:
    """Write a time stamp for people.

    Example:
        >>> readable("2026-11-28T07:05:53.715+00:00")
        '2026-11-28 07:05:53 UTC'
    """
    return datetime.fromisoformat(at).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
