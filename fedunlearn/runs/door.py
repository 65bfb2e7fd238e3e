"""A forget request from outside a run: filed in its ledger, and followed to its end."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.errors import UserError
from fedunlearn.runs.ledger import OPEN, Ledger, Request, State
from fedunlearn.runs.lock import holder, holder_trains, is_locked

POLL_SECONDS = 0.5
CLOSING_SECONDS = 600


@dataclass(frozen=True)
class RequestHandle:
    """What was asked of a run: a new request, and earlier ones that cover some of the clients.

    Attributes:
        folder: the run's.
        ids: of the requests.
        opened: opens the run's ledger, or gives one that is open.

    Example:
        `fedunlearn.open_run("demo").request([3]).follow(print)`
    """

    folder: Path
    ids: tuple[str, ...]
    opened: Callable[[], AbstractContextManager[Ledger]]

    def requests(self) -> list[Request]:
        """Read the requests as they stand now."""
        with self.opened() as ledger:
            return self._of(ledger)

    @property
    def is_open(self) -> bool:
        """Whether one of them has still to be applied or completed."""
        return any(request.state in OPEN for request in self.requests())

    def is_taken(self, *, on_wait: Callable[[], None] = lambda: None) -> bool:
        """Say whether a process holds the run and will look at its ledger again; one that will not is waited for.

        That is one that has trained all rounds, or that holds the run for something else, as a purge does.

        Args:
            on_wait: called once where the wait begins.

        Raises:
            TimeoutError: the process does not let go in `CLOSING_SECONDS`.
        """
        deadline = None
        while is_locked(self.folder):
            with self.opened() as ledger:
                current = ledger.current()
            if holder_trains(self.folder) and (current is None or not current.finished):
                return True
            if deadline is None:
                on_wait()
                deadline = time.monotonic() + CLOSING_SECONDS
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"run {self.folder.name} takes no more requests, but process {holder(self.folder)} still holds it "
                    f"after {CLOSING_SECONDS} s: end that process, and repeat this command"
                )
            time.sleep(POLL_SECONDS)
        return False

    def follow(
        self, on_change: Callable[[Request], None] = lambda request: None, *, limit: float = math.inf
    ) -> list[Request]:
        """Wait until none of the requests is open.

        Args:
            on_change: called with a request whenever its state has changed.
            limit: seconds after which waiting is given up.

        Raises:
            TimeoutError: after `limit` seconds; the requests stay filed.
            UserError: the process that had the run has ended before.
        """
        seen: dict[str, State] = {}
        deadline = time.monotonic() + limit
        with self.opened() as ledger:
            while True:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"run {self.folder.name} has not applied the request within {limit:g} s")
                live = is_locked(self.folder)
                requests = self._of(ledger)
                for request in requests:
                    if seen.get(request.id) != request.state:
                        seen[request.id] = request.state
                        on_change(request)
                if not any(request.state in OPEN for request in requests):
                    return requests
                if not live:
                    raise UserError(
                        f"run {self.folder.name} stopped before the request was applied: repeat this command, or "
                        f"resume the run with run={self.folder.name}"
                    )
                time.sleep(POLL_SECONDS)

    def _of(self, ledger: Ledger) -> list[Request]:
        return [ledger.request(request_id) for request_id in self.ids]
