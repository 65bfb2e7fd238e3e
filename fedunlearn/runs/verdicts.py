"""What became of every forget request, in a sentence or two that anybody can read."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from fedunlearn.naming import named
from fedunlearn.runs.formats import duration
from fedunlearn.runs.ledger import FORGOTTEN, VOID, Request, State
from fedunlearn.runs.uncertainty import Estimate, fraction, memorisation_gap

WIDE = 0.1  # a gap that could hide behind the uncertainty and should not

Scores = Mapping[str, Any]


class Level(StrEnum):
    """How a verdict is to be taken."""

    GOOD = "good"
    WARNING = "warning"
    FAILED = "failed"
    OPEN = "open"
    PLAIN = "plain"


TITLES = {
    Level.GOOD: "Forgotten",
    Level.WARNING: "Look closer",
    Level.FAILED: "Not forgotten",
    Level.OPEN: "Under way",
    Level.PLAIN: "",
}


@dataclass(frozen=True)
class Verdict:
    """Says what became of a request.

    Attributes:
        text: one to three sentences.
        level: how they are to be taken.
        title: the same in a word or two; may be empty.
        request: its id; empty for what is true of the whole run.
    """

    text: str
    level: Level
    title: str = ""
    request: str = ""


@dataclass(frozen=True)
class Moment:
    """Holds the scores of one model.

    Attributes:
        when: as a table's column says it.
        round: after which it was measured.
    """

    when: str
    round: int
    scores: Scores


def verdicts(
    requests: Sequence[Request],
    rows: Sequence[dict[str, Any]],
    *,
    label: str,
    class_counts: np.ndarray | None = None,
    names: Sequence[str] = (),
) -> list[Verdict]:
    """Say what became of every request, or how good the model is where there is none.

    Args:
        requests: of the ledger.
        rows: of `metrics.jsonl`.
        label: what people call the run's strategy. A request of another one has that one's name.
        class_counts: images of every client by class, [C, K], where an auditor knows them.
        names: of all clients by number, where they have names.
    """
    found: list[Verdict] = []
    for place, request in enumerate(requests):
        later = [r for r in requests[place + 1 :] if r.state not in VOID]
        covering = [r.id for r in later if set(request.clients) <= r.covered or set(request.owners) <= set(r.clients)]
        own = request.detail.get("how", {}).get("strategy", label)
        found.append(_verdict(request, moments(request, rows), own, class_counts, covering, names))
    return found if requests else [*found, _without_request(rows)]


def beside_retrained(
    request: Request,
    rows: Sequence[dict[str, Any]],
    *retrained: Sequence[dict[str, Any]],
    names: Sequence[str] = (),
) -> Verdict | None:
    """Say whether the model knows a request's clients as well as retrained models do, in the last common round.

    Retrained models of other seeds differ among each other. So the error of their mean is at least their standard
    deviation: the model is like them where it could be one more of them.

    Args:
        request: that was applied.
        rows: of `metrics.jsonl`.
        retrained: the same of each run in which the clients never took part.
        names: of all clients by number, where they have names.

    Returns:
        None where they were never all evaluated after the same round, or nobody measured the clients.
    """
    ours, *others = ({row["round"]: row for row in each if "test" in row} for each in (rows, *retrained))
    ours = {round_: row for round_, row in ours.items() if round_ > request.detail["round"]}
    if "after" in request.detail:
        ours = {request.detail["completed_round"]: request.detail["after"], **ours}
    measured = {client for row in ours.values() for client in row["forgotten"]}
    clients = [str(client) for client in request.clients if str(client) in measured]
    common = [
        round_
        for round_ in ours.keys() & set.intersection(*(set(each) for each in others))
        if clients and all(client in each[round_]["forgotten"] for client in clients for each in (ours, *others))
    ]
    if not common:
        return None
    last = max(common)
    found, expected = _of_clients(clients, ours[last]), _mean([_of_clients(clients, each[last]) for each in others])
    tested, aim = _of_test(ours[last]), _mean([_of_test(each[last]) for each in others])
    whom, several = named(request.clients, names), len(request.clients) > 1
    models = "a model that was" if len(others) == 1 else f"{len(others)} models that were"
    text = (
        f"After round {last} {models} retrained without {whom} get{'s' * (len(others) == 1)} {expected.short()} of "
        f"{_theirs(several)} images right, and this one {found.short()}. Of the test images they get {aim.short()} and "
        f"{tested.short()}."
    )
    apart = found - expected
    if apart.is_above_zero:
        return Verdict(
            f"{text} This one still knows {'them' if several else 'it'} better.", Level.WARNING, "Knows more"
        )
    if apart.is_below_zero:
        return Verdict(f"{text} This one forgot too much.", Level.WARNING, "Forgets too much")
    if (tested - aim).is_below_zero:
        return Verdict(f"{text} This one has lost more than that.", Level.WARNING, "Forgotten, at a price")
    return Verdict(
        f"{text} By that {'the two' if len(others) == 1 else 'they'} cannot be told apart.",
        Level.GOOD,
        "Like the retrained model",
    )


def _of_test(row: Mapping[str, Any]) -> Estimate:
    return fraction(row["test"]["class"], row["test"]["examples"])


def _mean(each: Sequence[Estimate]) -> Estimate:
    """Estimate what a further model of the same kind would get, from models that were measured on the same images."""
    spread = statistics.stdev(one.value for one in each) if len(each) > 1 else 0.0
    error = statistics.fmean(one.error for one in each)
    return Estimate(statistics.fmean(one.value for one in each), max(spread, error))


def _of_clients(clients: Sequence[str], row: Mapping[str, Any]) -> Estimate:
    """Estimate the class accuracy on all images of clients."""
    each = [row["forgotten"][client] for client in clients]
    examples = sum(scores["examples"] for scores in each)
    return fraction(sum(scores["class"] * scores["examples"] for scores in each) / max(examples, 1), examples)


def moments(request: Request, rows: Sequence[dict[str, Any]]) -> list[Moment]:
    """Give what was measured before a request, when it was completed, and after the last round since, if any."""
    detail, found = request.detail, []
    if "before" in detail:
        found.append(Moment("before", detail["round"], detail["before"]))
    if "after" in detail:
        found.append(Moment("after", detail["completed_round"], detail["after"]))
    last = latest(rows)
    if found and last and last.round > found[-1].round:
        found.append(last)
    return found


def latest(rows: Sequence[dict[str, Any]]) -> Moment | None:
    """Give what was measured after the last round that was."""
    measured = [row for row in rows if row["kind"] == "round" and "test" in row]
    if not measured:
        return None
    return Moment(f"after round {measured[-1]['round']}", measured[-1]["round"], measured[-1])


def newest(rows: Sequence[dict[str, Any]]) -> Moment | None:
    """Give what was measured last, after a round or right after a request."""
    for row in reversed(rows):
        if row["kind"] == "forget":
            return Moment(f"after request {row['request']}", row["round"], row["after"])
        if row["kind"] == "round" and "test" in row:
            return Moment(f"after round {row['round']}", row["round"], row)
    return None


def seconds(value: float) -> str:
    """Say how long something took, to a tenth below a minute."""
    return f"{value:.1f} s" if value < 60 else duration(value)


def _verdict(
    request: Request,
    measured: list[Moment],
    label: str,
    class_counts: np.ndarray | None,
    covering: list[str],
    names: Sequence[str],
) -> Verdict:
    if request.state in FORGOTTEN:
        verdict = _of_applied(request, measured, label, class_counts, names)
    else:
        verdict = _of_state(request, label, covering, names)
    title = verdict.title or TITLES[verdict.level] or str(request.state).capitalize()
    return replace(verdict, request=request.id, title=title)


def _of_state(request: Request, label: str, covering: list[str], names: Sequence[str]) -> Verdict:
    """Say what became of a request that no model has been made for."""
    who, several = named(request.clients, names), len(request.clients) > 1
    reason, attempts = request.detail.get("reason", ""), request.detail.get("attempts", 0)
    because = f": {reason}" if reason else ""
    later = f" Request {covering[-1]}, which came later, covers {'them' if several else 'it'} too." if covering else ""
    tried = f" {_times(attempts)} without success so far{because}." if attempts else ""
    texts = {
        State.RECEIVED: f"The request to forget {who} waits for the end of a round.",
        State.COLLECTING: f"The request to forget {who} is at work, by {label}.{tried} "
        f"{'They train' if several else 'It trains'} no more.",
        State.REFUSED: f"The request to forget {who} was refused{because}. It changed nothing.{later}",
        State.QUARANTINED: f"The request to forget {who} failed, and was set aside after "
        f"{_times(attempts or 1, 'attempt')}{because}. {'Its clients stay' if several else 'Its client stays'} out of "
        f"training, but the model still holds what it learnt from {'them' if several else 'it'} before.{later}",
    }
    level = {State.REFUSED: Level.FAILED, State.QUARANTINED: Level.FAILED}.get(request.state, Level.OPEN)
    if request.state in texts:
        return Verdict(texts[request.state], level, "Refused" if request.state == State.REFUSED else "")
    return Verdict(f"The request to forget {who} is {str(request.state).lower()}{because}.{later}", Level.PLAIN)


def _of_applied(
    request: Request, measured: list[Moment], label: str, class_counts: np.ndarray | None, names: Sequence[str]
) -> Verdict:
    """Say what the model still knows of the images of clients whose request is applied."""
    detail, who = request.detail, named(request.clients, names)
    several = len(request.clients) > 1
    how = f"after round {detail['round']} by {label}, in {seconds(detail['seconds'])}"
    applied = f"The request to forget {who} was applied {how}."
    waits = "" if request.state == State.COMPLETED else f" It is completed after round {detail['completes_at']}."
    gaps = {moment.when: gap_of(request, moment, class_counts) for moment in measured}
    before, now = gaps.get("before"), gaps[measured[-1].when] if len(measured) > 1 else None
    if now is None:
        unknown = "" if waits else f" What the model still knows of {_theirs(several)} images was not measured."
        return Verdict(f"{applied}{unknown}{waits}", Level.OPEN if waits else Level.PLAIN, "" if waits else "Applied")
    since = measured[-1].when
    model = "The model" if since == "after" else f"{since.capitalize()} the model"
    images = f"{_theirs(several)} {_examples(request, measured[-1]):,} images"
    earlier = [f"{when}: {gap.short(signed=True)}" for when, gap in gaps.items() if gap and when != since]
    numbers = f"memorisation gap {now.short(signed=True)}" + (f" ({'; '.join(earlier)})." if earlier else ".")
    if now.is_above_zero:
        was_below = any(gap and not gap.is_above_zero for when, gap in gaps.items() if when not in ("before", since))
        verb = "knows" if was_below else "still knows"
        better = "better than held-out ones again" if was_below else "better than held-out ones"
        text = f"{applied} But {_lower(model)} {verb} {images} {better}: {numbers}"
        return Verdict(f"{text}{waits}", Level.WARNING, "Not forgotten")
    if now.is_below_zero:
        text = f"{applied} {model} gets fewer of {images} right than of held-out ones: {numbers}"
        return Verdict(f"{text} A model that never saw them has a gap near 0.{waits}", Level.WARNING, "Look closer")
    text = f"{applied} {model} knows {images} no better than held-out ones: {numbers}"
    apart = _apart(request, measured[-1], class_counts, names) if several else ""
    if apart:
        return Verdict(f"{text}{apart}{waits}", Level.WARNING)
    level, title = Level.OPEN if waits else Level.GOOD, ""
    if price := _price(measured[0], measured[-1]):
        return Verdict(f"{text}{price}{waits}", Level.WARNING, "Forgotten, at a price")
    if before and not before.is_above_zero:
        title, text = (
            "No trace found",
            f"{text} It did not know them better before, so that this says little of {label}.",
        )
    elif now.error > WIDE / 2:
        title = "No trace found"
        text = f"{text} With so few images a gap below {2 * now.error:.2f} cannot be seen."
    return Verdict(f"{text}{waits}", level, "" if waits else title)


def gap_of(
    request: Request, moment: Moment, class_counts: np.ndarray | None, client: int | None = None
) -> Estimate | None:
    """Estimate the memorisation gap of a request's clients, or of one of them."""
    wanted = request.clients if client is None else [client]
    each = {str(c): moment.scores["forgotten"][str(c)] for c in wanted if str(c) in moment.scores["forgotten"]}
    return memorisation_gap(each, moment.scores["test"]["examples"], class_counts)


def _apart(request: Request, moment: Moment, class_counts: np.ndarray | None, names: Sequence[str]) -> str:
    """Name the client that the model knows best, where that one alone is still known too well."""
    each = {client: gap_of(request, moment, class_counts, client) for client in request.clients}
    above = {client: gap for client, gap in each.items() if gap is not None and gap.is_above_zero}
    if not above:
        return ""
    client = max(above, key=lambda c: above[c].value)
    return f" But {named([client], names)} alone is still known better: {above[client].short(signed=True)}."


def _price(before: Moment, now: Moment) -> str:
    """Say how many test images less the model gets right than before the request, where that is no chance."""
    old, new = (fraction(m.scores["test"]["class"], m.scores["test"]["examples"]) for m in (before, now))
    if not (new - old).is_below_zero:
        return ""
    return f" It has a price: the model gets {new.short()} of the test images right (before: {old.short()})."


def _without_request(rows: Sequence[dict[str, Any]]) -> Verdict:
    last = latest(rows)
    if last is None:
        return Verdict("No client asked to be forgotten, and nothing has been measured yet.", Level.PLAIN)
    test = last.scores["test"]
    right = fraction(test["class"], test["examples"]).short()
    text = f"{last.when.capitalize()} the model gets {right} of the {test['examples']:,} test images right."
    return Verdict(f"No client asked to be forgotten. {text}", Level.PLAIN)


def _examples(request: Request, moment: Moment) -> int:
    each = moment.scores["forgotten"]
    return sum(each[str(client)]["examples"] for client in request.clients if str(client) in each)


def _times(attempts: int, what: str = "attempt") -> str:
    return f"{attempts} {what}{'s' if attempts > 1 else ''}"


def _theirs(several: bool) -> str:
    return "their" if several else "its"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
