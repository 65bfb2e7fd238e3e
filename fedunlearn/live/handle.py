"""A run in the background, and what Python can ask of it: wait, look, forget, audit."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedunlearn.errors import UserError
from fedunlearn.live import frames
from fedunlearn.live.auditing import Audit, audit
from fedunlearn.live.background import POLL_SECONDS, Background, Lines, end_run, followed
from fedunlearn.live.base import BUSY, Handle, RunState
from fedunlearn.live.cards import Page, card, shown
from fedunlearn.live.words import options_for, words_of
from fedunlearn.naming import listed
from fedunlearn.runs.home import log_of
from fedunlearn.runs.ledger import Ledger
from fedunlearn.runs.lock import is_locked

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch import Tensor

    from fedunlearn.live.receipt import Receipt
    from fedunlearn.nn.model import TwoHeadModel
    from fedunlearn.runs.door import RequestHandle

LEVELS = {RunState.FINISHED: "good", RunState.FAILED: "failed", RunState.STOPPED: "warning"}


@dataclass
class LiveRun(Handle):
    """A handle on a run, live or not.

    Attributes:
        name: of the run.
        home: the state folder that it lies in.
        resources: what commands about it work on.
    """

    _lines: Lines = field(init=False, repr=False)

    def __post_init__(self) -> None:
        begins = self._process.begins if self._process else _size(self.log)
        self._lines = Lines(self.log, begins)

    # Until it ends -------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None = None, *, quiet: bool = False) -> "LiveRun":
        """Wait until the run has ended, and show meanwhile what it says. Ctrl-C ends the wait, not the run.

        Args:
            timeout: seconds; None waits for as long as it takes.
            quiet: show nothing.

        Returns:
            The run.

        Raises:
            UserError: it failed or was stopped; in its own words.
            TimeoutError: after `timeout` seconds; the run goes on.
        """
        followed(
            lambda: self.state in BUSY,
            self._lines,
            timeout=timeout,
            late=f"run {self.name} is not done within {timeout} s, and goes on: {self.round} rounds are trained",
            interrupted=f"run {self.name} goes on in the background: wait() waits again, stop() ends it",
            quiet=quiet,
        )
        self._check()
        return self

    def stop(self) -> None:
        """End the run's process. What is committed stays, and the same `fedunlearn.run(..., run=NAME)` goes on.

        Raises:
            UserError: the process does not end, or it holds the run for something else, such as a purge or a fork.
        """
        if self._process and self._process.is_working:
            self._process.stop()
        elif is_locked(self.folder):
            end_run(self.folder)

    # What there is to see ------------------------------------------------------------------------------------------

    def metrics(self) -> "DataFrame":
        """Give a table with a row a round: losses and accuracies at its end; none before the first round.

        Columns are `train_loss`, `train_accuracy`, `retain_accuracy`, `test_accuracy`, `client_id_accuracy`,
        `forget_accuracy`, `memorisation_gap`, `seconds`, and `client_3` for the images of client 3.
        """
        if not self._has_begun():
            return frames.of_rounds([])
        with self.opened() as found:
            return frames.of_rounds(found.metrics(), found.names())

    def requests(self) -> "DataFrame":
        """Give a table with a row a request: its state, and accuracies before and after it."""
        if not self._has_begun():
            return frames.of_requests([])
        with self.opened() as found:
            return frames.of_requests(found.ledger.requests(), found.names())

    def rows(self) -> list[dict[str, Any]]:
        """Read the rows of `metrics.jsonl`; none before the run has begun."""
        if not self._has_begun():
            return []
        with self.opened() as found:
            return found.metrics()

    def plot(self) -> "Figure":
        """Draw class and client-ID accuracies over the rounds, and when clients were forgotten."""
        from fedunlearn.runs.figures import accuracy_figure
        from fedunlearn.runs.report import marks

        with self.opened() as found:
            asked = marks(found.ledger.requests(), found.ledger.events())
            return shown(accuracy_figure(found.metrics(), asked, None, found.names()))

    def report(self) -> Page:
        """Write the run's report anew, and give the page."""
        from fedunlearn.apps.reports import write

        with self.opened() as found:
            return Page(write(found))

    # The model -----------------------------------------------------------------------------------------------------

    def model(self) -> "TwoHeadModel":
        """Load the current model, in eval mode on the CPU.

        Raises:
            UserError: there is no checkpoint, or it was damaged.
        """
        with self.opened() as found:
            return found.model()

    def predict(self, images: "np.ndarray") -> "Tensor":
        """Predict class probabilities [N, K] with the current model.

        Args:
            images: uint8 [N, H, W, channels], or of a table fp32 rows [N, 1, 1, features].

        Raises:
            UserError: images of another form, or there is no sound checkpoint.
        """
        with self.opened() as found:
            return found.predict(images)

    def class_names(self) -> list[str]:
        """List the names of the K classes, in the order of the model's outputs."""
        with self.opened() as found:
            return found.class_names()

    # Forgetting ----------------------------------------------------------------------------------------------------

    def forget(
        self,
        clients: int | str | Sequence[int | str] = (),
        *,
        classes: int | str | Sequence[int | str] = (),
        patients: str | Sequence[str] = (),
        examples: str | Path | Sequence[str] = (),
        by: str = "",
        right: str = "",
        key: str | Path = "",
        timeout: float | None = None,
        quiet: bool = False,
        **settings: Any,
    ) -> "Receipt":
        """Have clients forgotten, or some of their images, together, and wait until that has ended.

        A live run takes the request at its next round boundary, after its first round at the earliest. Else a process
        of its own applies it now.

        Args:
            clients: their numbers, or names where they have some; a number is a name where any client has one for a
                name. One alone needs no list. With one of the next three, none means all clients that have such images.
            classes: images of these classes alone, by name or number, as for clients.
            patients: images of these patients alone.
            examples: names of the images that alone are meant, or a file with one a line.
            by: who asks; the receipt says it.
            right: by what right.
            key: file of the client's private key, for a run that takes only signed requests.
            timeout: seconds; None waits for as long as it takes.
            quiet: show nothing.
            settings: of this request alone, `strategy="ssd"` and `unlearn={"alpha": 8}`.

        Returns:
            The receipt. Its `state` says whether the request is COMPLETED, REFUSED or QUARANTINED.

        Raises:
            UserError: there is no such client, or the run cannot serve the request.
            TimeoutError: after `timeout` seconds; the request stays filed.

        Example:
            >>> run.forget(clients=[3], by="hospital 3", right="Art. 17 GDPR").state  # doctest: +SKIP
            'COMPLETED'
        """
        from fedunlearn.live.receipt import Receipt

        deadline = None if timeout is None else time.monotonic() + timeout
        self._until_trained(deadline)
        about = {"client": clients, "class": classes, "patient": patients}
        with _as_file(examples) as file:
            options = {"examples": str(file), "by": by, "right": right, "key": str(key)}
            about |= {name: value for name, value in options.items() if value}
            words = [*options_for(about), *words_of(settings)]
            requests = self._command(
                ["forget", *words, "--wait", "--wait-limit=inf", "--json"], deadline=deadline, quiet=quiet
            )
        return Receipt(self._receipt_of(requests[-1]["id"], deadline))

    def request(self, clients: int | str | Sequence[int | str], *, by: str = "", right: str = "") -> "RequestHandle":
        """Ask for clients to be forgotten, and go on at once; `follow()` of the result waits.

        A live run takes the request at its next round boundary. Else nobody does, until somebody serves the run.

        Raises:
            UserError: the run has not begun, there is no such client, or there is no sound checkpoint to forget from.
        """
        with self.opened() as found:
            handle = found.request(listed(clients), by=by, right=right)
        return replace(handle, opened=self._ledger)

    def receipts(self) -> "list[Receipt]":
        """Give the last receipt of every request that has ended."""
        from fedunlearn.live.receipt import Receipt

        with self.opened() as found:
            files = {event["of"]: event["receipt"] for event in found.ledger.events() if "receipt" in event}
        return [Receipt(self.folder / "receipts" / file) for file in files.values()]

    def audit(self, retrained: int = 2) -> Audit:
        """Compare the current model with models that are retrained without the forgotten clients.

        It costs that many trainings from scratch, and says beforehand about how long they take. They are runs of the
        state folder. So an audit that was interrupted goes on, and the same audit again costs nothing.

        Args:
            retrained: how many models, each with another seed.

        Raises:
            UserError: nobody was forgotten, rounds are missing, or the forgotten clients' images are gone.

        Example:
            >>> run.audit(retrained=2).verdict  # doctest: +SKIP
            'Like the retrained model'
        """
        return audit(self, retrained)

    # ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        """Open the run's ledger."""
        with self.opened() as found:
            yield found.ledger

    def _check(self) -> None:
        """Raise UserError where the run has not been trained to its end."""
        if (state := self.state) in (RunState.FAILED, RunState.STOPPED):
            reason = self._reason() or "nobody works on it, and rounds are missing"
            raise UserError(f"run {self.name} {state} after round {self.round}: {reason} (log: {self.log})")

    def _until_trained(self, deadline: float | None) -> None:
        """Wait for the first round of a run that has just been started: nobody is in its model before."""
        while self.state in BUSY and not self.round:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.name} has not trained its first round yet: nothing is filed")
            time.sleep(POLL_SECONDS)
        if not self._has_begun():
            self._check()

    def _command(self, words: list[str], *, deadline: float | None, quiet: bool) -> Any:
        """Run a command about this run, show what it says, and give the JSON that it prints."""
        about = [f"--run={self.name}", f"--home={self.home}", *self.resources.options("engine", "nodes", "gpus")]
        with tempfile.TemporaryFile() as output:
            log = log_of(self.home, f"{self.name}-{words[0]}")
            process = Background.started([*words, *about], log, output=output.fileno())
            followed(
                lambda: process.is_working,
                Lines(log, process.begins),
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic()),
                late=f"run {self.name} has not done it in time: the request stays filed, and process "
                f"{process.process.pid} goes on with it",
                interrupted="the request stays filed, and is carried out in the background",
                quiet=quiet,
            )
            output.seek(0)
            said = output.read()
        if not said:
            raise UserError(process.reason())
        return json.loads(said)

    def _receipt_of(self, request_id: str, deadline: float | None) -> Path:
        """Find the last receipt of a request that has ended; the process that holds the run writes it at once."""
        from fedunlearn.runs import receipts

        while True:
            live = is_locked(self.folder)
            with self.opened() as found:
                if not live:
                    receipts.write_all(found)
                files = [event["receipt"] for event in found.ledger.events() if event.get("of") == request_id]
            if files:
                return self.folder / "receipts" / files[-1]
            if not live:
                raise UserError(f"request {request_id} of run {self.name} has not ended: there is no receipt of it")
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.name} has not written the receipt of request {request_id} yet")
            time.sleep(POLL_SECONDS)

    def _repr_html_(self) -> str:
        rows, facts = self.rows(), list[tuple[str, object]]()
        if self._has_begun():
            facts.append(("round", f"{self.round} of {self.config.rounds}"))
        if tested := [row["test"]["class"] for row in rows if row["kind"] == "round" and "test" in row]:
            facts.append(("test accuracy", f"{tested[-1]:.3f}"))
        if self._has_begun():
            with self.opened() as found:
                for request in found.ledger.requests():
                    facts.append((f"request {request.id}", f"{found.named(request.clients)}: {request.state}"))
        state = self.state
        if state == RunState.FAILED:
            facts.append(("reason", self._reason()))
        return card(f"Run {self.name}", state, facts, level=LEVELS.get(state, "open"))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@contextmanager
def _as_file(names: str | Path | Sequence[str]) -> Iterator[str | Path]:
    """Give names as a file with one a line; a file is given as it is."""
    if isinstance(names, str | Path) or not names:
        yield names if isinstance(names, str | Path) else ""
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "names.txt"
        file.write_text("\n".join(names), "utf-8")
        yield file
