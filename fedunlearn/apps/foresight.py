"""What a request would meet with, before anybody files it: how many images it is about, and why it would be refused."""

from collections.abc import Collection
from typing import NamedTuple

from fedunlearn.data.selection import Portion, Selection
from fedunlearn.federation.auditor import Auditor, auditor_of
from fedunlearn.federation.requests import NOBODY_LEFT, named_before, nothing_left, unsuitable_portions
from fedunlearn.runs.ledger import NOT_VOID, TAKEN_UP, State
from fedunlearn.runs.run import Run


class Outlook(NamedTuple):
    """What would come of a request.

    Attributes:
        images: that it is about, by client.
        refusal: why it would be refused; empty where nothing is known to stand against it.
    """

    images: dict[int, int]
    refusal: str

    def in_words(self, found: Run) -> str:
        """Say how many images are meant, and whose."""
        each = [f"{count} of {found.named([client])}" for client, count in self.images.items() if count]
        listed = [*each[:MOST], f"those of {len(each) - MOST} more"] if len(each) > MOST else each
        total = sum(self.images.values())
        whose = f": {', '.join(listed)}" if listed else ""
        return f"{total} training image{'s' * (total != 1)} would be forgotten{whose}"


MOST = 10
"""Clients whose images are counted in a line."""
BEFORE = (*NOT_VOID, State.QUARANTINED)
"""Where requests stand whose portions are no longer among a client's images, or will not be by then."""


def outlook(found: Run, clients: Collection[int], selection: Selection | None) -> Outlook | None:
    """Say what would come of a request; None where only machines of their own know how many images there are.

    Args:
        found: the run.
        clients: whose images are meant.
        selection: which of the images; all by default.
    """
    auditor, ledger = auditor_of(found.config_here()), found.ledger
    if auditor is None:
        return None
    known, asked = ledger.portions(BEFORE), set(ledger.clients_in(NOT_VOID))
    left = {client: count for client, count in auditor.examples(known).items() if client not in asked}
    numbers, out = ledger.numbered(clients, selection), set(ledger.clients_in(TAKEN_UP))
    if selection:
        first = found.config.clients + len(ledger.portions())
        new = enumerate((client for client, number in numbers.items() if number is None), first)
        return _of_portions(
            found,
            auditor,
            {number: Portion(number, client, selection) for number, client in new},
            {client: count for client, count in left.items() if client not in out},
        )
    images = {client: left[client] for client in numbers if client in left}
    if max(images.values(), default=0) < 2 and images:
        first = min(images)
        return Outlook(images, nothing_left(ledger, first, found.named([first]), images[first]))
    others = [count for client, count in left.items() if client not in {*images, *out}]
    return Outlook(images, "" if max(others, default=0) >= 2 else NOBODY_LEFT)


def _of_portions(found: Run, auditor: Auditor, portions: dict[int, Portion], left: dict[int, int]) -> Outlook:
    known = found.ledger.portions(BEFORE)
    counts = {number: auditor.selected(portion, known) for number, portion in portions.items()}
    images = {portion.client: counts[number] for number, portion in portions.items()}
    reason = unsuitable_portions(portions, counts, named_before(found.ledger))
    rest = max((count - images.get(client, 0) for client, count in left.items()), default=0)
    return Outlook(images, reason or ("" if rest >= 2 else NOBODY_LEFT))
