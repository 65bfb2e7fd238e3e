"""What a request would meet with, before anybody files it: how many images it is about, and why it would be refused."""

from collections.abc import Collection
from itertools import count
from typing import NamedTuple

from fedunlearn.data.selection import Portion, Selection
from fedunlearn.federation.auditor import auditor_of
from fedunlearn.federation.portions import NOBODY_LEFT, named_before, nothing_left, unsuitable_portions
from fedunlearn.runs.ledger import COUNTED, NOT_VOID, TAKEN_UP
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
    asked, out = set(ledger.clients_in(NOT_VOID)), set(ledger.clients_in(TAKEN_UP))
    numbers, apart = ledger.numbered(clients, selection), ledger.portions(COUNTED)
    met = {number: portion for number, portion in apart.items() if number in asked}
    if selection:
        unused = count(found.config.clients + len(ledger.portions()))
        new = {number or next(unused): client for client, number in numbers.items() if number not in asked}
        portions = {number: Portion(number, client, selection) for number, client in new.items()}
        if not portions:
            return Outlook({}, "")
        counts = {number: auditor.selected(portion, met) for number, portion in portions.items()}
        reason = unsuitable_portions(portions, counts, named_before(ledger))
        images = {client: counts[number] for number, client in new.items()}
        rest = [n for client, n in auditor.examples(apart | portions).items() if client not in asked | out]
        return Outlook(images, reason or ("" if max(rest, default=0) >= 2 else NOBODY_LEFT))
    present = auditor.examples(met)
    images = {client: present[client] for client in numbers if client not in asked}
    trained_on = auditor.examples()  # with a client's portions
    if images and all(not n or trained_on[client] < 2 for client, n in images.items()):
        first = min(images)
        return Outlook(images, nothing_left(ledger, first, found.named([first]), images[first]))
    others = [n for client, n in auditor.examples(apart).items() if client not in {*images, *asked, *out}]
    return Outlook(images, "" if max(others, default=0) >= 2 else NOBODY_LEFT)
