"""A request that was typed into the form: what would come of it, and the way into the run."""

import re
from dataclasses import dataclass
from typing import Any

from fedunlearn.apps.serve.jobs import Jobs
from fedunlearn.config import check_clients
from fedunlearn.errors import UserError
from fedunlearn.runs.events import now
from fedunlearn.runs.ledger import due
from fedunlearn.runs.lock import is_locked
from fedunlearn.runs.run import Run
from fedunlearn.runs.signed import SignedRequest, read
from fedunlearn.runs.timeline import readable
from fedunlearn.schema import check_text

MOST_TYPED = 200  # characters in a field


@dataclass(frozen=True)
class Asked:
    """What somebody typed.

    Attributes:
        clients: as `3`, or `3, 5`.
        by: who asks.
        right: by what right.
        signed: what the clients' key has signed.
    """

    clients: str
    by: str = ""
    right: str = ""
    signed: str = ""

    def numbers(self, run: Run) -> list[int]:
        """Give the clients' numbers, each once.

        Raises:
            UserError: a text is too long or none, or the run has no such client.
        """
        for text in (self.clients, self.by, self.right):
            check_text(text)
            if len(text) > MOST_TYPED:
                raise UserError(f"{text[:20]}… has {len(text)} characters: a field takes {MOST_TYPED}")
        words = [word.strip() for word in self.clients.split(",")]
        for word in words:
            if not re.fullmatch(r"[0-9]{1,9}", word):
                raise UserError(f"client {word[:20]!r} is not a whole number: type one as 3, or several as 3, 5")
        numbers = sorted({int(word) for word in words})
        check_clients(numbers, run.config.clients)
        return numbers

    def signature(self) -> SignedRequest | None:
        """Read what the clients' key has signed, if anything was."""
        return read(self.signed.encode()) if self.signed.strip() else None


def outlook(run: Run, asked: Asked, jobs: Jobs) -> dict[str, Any]:
    """Say what a request would do; nothing is filed and nothing written.

    Raises:
        UserError: it would be turned away.
    """
    from fedunlearn.apps.asking import announcement

    clients = asked.numbers(run)
    run.would_take(asked.signature(), clients)
    return {
        "clients": clients,
        "announcement": announcement(run, clients, {}),
        "earlier": run.ledger.covering(clients),
        "is_taken": is_taken(run),
        "command": jobs.words(run.name, asked.clients, by=asked.by, right=asked.right, signed=asked.signed),
        "due": readable(due(now(), run.config.forget.due_months)),
    }


def file(run: Run, asked: Asked, jobs: Jobs) -> None:
    """File a request with the process that holds the run; where there is none, start the command that applies it.

    The command checks before it files anything, as it does for whoever types it: the model, the images, the strategy.

    Raises:
        UserError: it is turned away.
    """
    clients = asked.numbers(run)
    if is_taken(run):
        run.request(clients, by=asked.by, right=asked.right, signed=asked.signature())
        if is_taken(run) or run.config.forget.signed:  # what was signed can be filed once: the next start takes it up
            return
    jobs.start(run.name, asked.clients, by=asked.by, right=asked.right, signed=asked.signed)


def is_taken(run: Run) -> bool:
    """Say whether a process holds the run and will look at its ledger again."""
    current = run.ledger.current()
    return is_locked(run.folder, patience=0) and (current is None or not current.finished)
