"""A request that was typed into the form: what would come of it, and the way into the run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedunlearn.apps.serve.jobs import Jobs
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.runs.events import now
from fedunlearn.runs.ledger import OPEN, due
from fedunlearn.runs.lock import holder_trains, is_locked
from fedunlearn.runs.run import Run
from fedunlearn.runs.signed import SignedRequest, action_of, read
from fedunlearn.runs.timeline import readable
from fedunlearn.schema import check_text

MOST_TYPED = 200  # characters in a field
MOST_NAMED = 20  # clients beside the field


@dataclass(frozen=True)
class Asked:
    """What somebody typed.

    Attributes:
        clients: as `3`, `3, 5` or `hospital_b`; may be empty where a class or a patient is named.
        class_: number of the class whose images alone are meant; empty for all classes.
        patient: whose images alone are meant; empty for those of all.
        by: who asks.
        right: by what right.
        signed: what the clients' key has signed.
    """

    clients: str = ""
    class_: str = ""
    patient: str = ""
    by: str = ""
    right: str = ""
    signed: str = ""

    def numbers(self, run: Run) -> list[int]:
        """Give the clients' numbers, each once; none where a class or a patient of all clients is meant.

        Raises:
            UserError: a text is too long or none, or no client is called so.
        """
        for text in (self.clients, self.class_, self.patient, self.by, self.right):
            check_text(text)
            if len(text) > MOST_TYPED:
                raise UserError(f"{text[:20]}… has {len(text)} characters: a field takes {MOST_TYPED}")
        if not self.clients and not self.selection():
            raise UserError("say whom: a client, or a class or a patient of all clients")
        return sorted(run.numbers_of([self.clients])) if self.clients else []

    def selection(self) -> Selection | None:
        """Give which of the clients' images are meant; None for all.

        Raises:
            UserError: the class is no number.
        """
        if not re.fullmatch(r"[0-9]{0,9}", self.class_):
            raise UserError(f"class {self.class_[:20]!r} is not the number of one")
        return Selection.by([int(self.class_)] if self.class_ else [], [self.patient] if self.patient else []) or None

    def signature(self) -> SignedRequest | None:
        """Read what the clients' key has signed, if anything was."""
        return read(self.signed.encode()) if self.signed.strip() else None

    def options(self, class_names: Sequence[str]) -> list[str]:
        """Give the same as options of `fedunlearn forget`, which reads what was signed from stdin.

        There a class has its name: a number may be the name of another one.
        """
        class_ = class_names[int(self.class_)] if self.class_ else ""
        named = {"client": self.clients, "class": class_, "patient": self.patient}
        named |= {"by": self.by, "right": self.right, "signed": self.signed and "/dev/stdin"}
        return [f"--{name}={text}" for name, text in named.items() if text]


def outlook(run: Run, asked: Asked) -> dict[str, Any]:
    """Say what a request would do; nothing is filed and nothing written.

    Raises:
        UserError: it would be turned away.
    """
    from fedunlearn.apps.asking import announcement

    clients, selection = asked.numbers(run), asked.selection()
    meant = run.meant(clients, selection)
    run.would_take(asked.signature(), meant, action=action_of(selection))
    earlier, months = run.ledger.covering(meant, selection), run.config.forget.due_months
    return {
        "whom": whom(run, clients, selection),
        "is_whole": not selection,
        "announcement": announcement(run, meant, {}, selection),
        "earlier": earlier,
        "is_done": bool(earlier) and (is_taken(run) or all(request.state not in OPEN for request in earlier)),
        "is_taken": is_taken(run),
        "due": readable(min((one.detail["due_at"] for one in earlier), default=due(now(), months))),
    }


def file(run: Run, asked: Asked, jobs: Jobs) -> None:
    """File a request with the process that holds the run; where there is none, start the command that applies it.

    The command checks before it files anything, as it does for whoever types it: the model, the images, the strategy.

    Raises:
        UserError: it is turned away.
    """
    clients, selection = asked.numbers(run), asked.selection()
    run.meant(clients, selection)
    if is_taken(run):
        run.file(clients, by=asked.by, right=asked.right, signed=asked.signature(), selection=selection)
        if is_taken(run) or run.config.forget.signed:  # what was signed can be filed once: the next start takes it up
            return
    jobs.start(run.name, asked.options(run.class_names()), given=asked.signed)


def accept(run: Run, request_id: str, by: str, jobs: Jobs) -> None:
    """Have a model taken that the gate has refused, by the process that holds the run, else by a command.

    Args:
        by: who answers for that.

    Raises:
        UserError: nobody answers for it, or there is no such request.
    """
    check_text(by)
    if not by:
        raise UserError("say who answers for it: the receipt says that")
    run.ledger.acceptable(request_id)
    if is_taken(run):
        run.ledger.accept(request_id, by)
    else:
        jobs.start(run.name, [f"--accept={request_id}", f"--by={by}"])


def whom(run: Run, clients: Sequence[int], selection: Selection | None) -> str:
    """Say who or what is to be forgotten, as `class 1 (frog) of client 3`."""
    who = run.named(clients) if clients else "all clients"
    return f"{selection.in_words(run.class_names())} of {who}" if selection else who


def is_taken(run: Run) -> bool:
    """Say whether a process holds the run and will look at its ledger again."""
    current = run.ledger.current()
    serves = current is None or not current.finished
    return serves and is_locked(run.folder, patience=0) and holder_trains(run.folder)
