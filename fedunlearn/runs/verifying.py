"""Verifies receipts, offline, and runs as they lie on disk; needs no torch."""

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import rfc8785
from pydantic import ValidationError
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error

from fedunlearn.config import RUN_NAME
from fedunlearn.errors import UNREADABLE, UserError, printable
from fedunlearn.runs import keys, merkle
from fedunlearn.runs.events import Head, entry
from fedunlearn.runs.ledger import State
from fedunlearn.runs.receipts import FOLDER, PAYLOAD_TYPE, as_file, statement_of
from fedunlearn.runs.run import Run
from fedunlearn.runs.statement import ENDED, Receipt, Statement, Told, brought, content, gate_reason, instant, told_by

DESTROYED = {"passed", "reason"}  # what the gate says of a model that has no figures


class InvalidError(UserError):
    """A receipt is not what it claims to be; what it says of that is written out."""

    def __init__(self, reason: object) -> None:
        super().__init__(printable(str(reason)))


def verified(data: bytes, *, key: str = "", log: Path | None = None) -> Receipt:
    """Read a receipt and check everything that can be checked without its run.

    The file is in its only form and follows the schema; every signature is valid; the events are in the signed ledger;
    all that follows from them is as the receipt says; times are in order; the gate's figures give the gate's verdict.

    Args:
        data: the file.
        key: id of the key that must have signed; without one, of whatever run the receipt names.
        log: the run's ledger, or a head of it; the receipt's events must be there too.

    Raises:
        InvalidError: with the first thing that is wrong.
        UserError: nobody can say whether the events are in `log`.
    """
    envelope = envelope_of(data)
    receipt = _receipt(envelope)
    head = receipt.head
    if head.key not in envelope.signatures:
        raise InvalidError(f"it is not signed with the run's key {head.key}")
    if key and key not in envelope.signatures:
        raise InvalidError(f"it is not signed with the key {key}, but with {', '.join(envelope.signatures)}")
    if not head.is_signed:
        raise InvalidError("the head of the ledger is not signed with the run's key")
    _check_events(receipt, head)
    _check_times(receipt)
    _check_gate(receipt)
    if log:
        _check_log(receipt, log)
    return receipt


def problems(run: Run, *, key: str = "", log: Path | None = None) -> Iterator[str]:
    """Say everything that is not as the run wrote it; the ledger and `run.json` were checked when it was opened.

    Args:
        run: that is open.
        key: id of the key that the run must have; without one, of whatever key it has.
        log: a head of the ledger that was kept elsewhere.
    """
    if key and key != run.ledger.key:
        yield f"the run's key is {run.ledger.key}, not {key}"
    if log:
        try:
            check_continues(run, log)
        except InvalidError as error:
            yield str(error)
    if run.ledger.kept_head() is None:
        yield f"heads/{run.name}.json is missing: nobody can say whether events were cut off the end of the ledger"
    for number in run.ledger.unwitnessed():
        yield f"after event {number} heads/{run.name}.json was missing: events may have been cut off there"
    try:
        run.check_checkpoint()
    except UserError as error:
        yield str(error)
    current = run.ledger.current()
    for file in (run.folder / "checkpoints").glob("*"):
        if current and file.name != current.checkpoint:
            yield f"{file} should not be there: only the current model is kept"
    known = {event["receipt"]: event["sha256"] for event in run.ledger.events() if "receipt" in event}
    for name, sha256 in known.items():
        file = run.folder / FOLDER / name
        try:
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise InvalidError("it is not the one that was written")
            check_of_run(run, data)
        except OSError as error:
            yield f"{file} cannot be read ({error.strerror})"
        except InvalidError as error:
            yield f"{file}: {error}"
    yield from _untold(run)
    for file in (run.folder / FOLDER).glob("*.json"):
        if file.name not in known:  # a countersigned one is valid
            try:
                with _or_invalid("it cannot be read"):
                    data = file.read_bytes()
                check_of_run(run, data, key=run.ledger.key)
            except InvalidError as error:
                yield f"{file}: the ledger does not know it, and {error}"


def _untold(run: Run) -> Iterator[str]:
    """Name the requests that have ended without a receipt of that; a process that holds the run may be writing it."""
    if run.is_live():
        return
    for request in run.ledger.requests():
        if request.state in ENDED and not run.ledger.is_told(request):
            yield (
                f"request {request.id} is {request.state}, and has no receipt of how it stands: "
                f"start the run again with run={run.name}, which writes it"
            )


@contextmanager
def _or_invalid(what: str) -> Iterator[None]:
    """Turn what parsers raise for bytes from outside into one error."""
    try:
        yield
    except (*UNREADABLE, OSError, Error) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise InvalidError(f"{what}: {reason}") from error


def envelope_of(data: bytes) -> Envelope:
    """Read an envelope that is in its only form and of which every signature is valid."""
    with _or_invalid("it is no envelope with a receipt"):
        envelope = Envelope.from_dict(json.loads(data))
    with _or_invalid("it is no envelope with a receipt"):
        if envelope.payload_type != PAYLOAD_TYPE or as_file(envelope) != data:
            raise InvalidError("it is not in the form in which receipts are written")
        for key, signature in envelope.signatures.items():
            if signature.unrecognized_fields or not keys.is_signed(signature.signature, envelope.pae(), key):
                raise InvalidError(f"the signature of {key} is not valid")
    return envelope


def _receipt(envelope: Envelope) -> Receipt:
    """Read the statement, in canonical JSON and of the known schema, about the model that the receipt names."""
    with _or_invalid("what is signed is no receipt"):
        said = json.loads(envelope.payload)
        if rfc8785.dumps(said) != envelope.payload:
            raise InvalidError("what is signed is not canonical JSON")
        statement = Statement.model_validate(said)
    if statement != statement_of(statement.predicate):
        raise InvalidError("its subject is not the model that the receipt names")
    if not re.fullmatch(RUN_NAME, statement.predicate.run) or not re.fullmatch(r"r\d+", statement.predicate.request):
        raise InvalidError("what it calls the run, or the request, is no name of one")
    return statement.predicate


def _check_events(receipt: Receipt, head: Head) -> None:
    """The events are among those of the head, and give what the receipt says."""
    with _or_invalid("its events are not sound"):
        for event in receipt.events:
            path = [bytes.fromhex(step) for step in event.proof]
            leaf, root = merkle.leaf(entry(event.at, event.text)), bytes.fromhex(head.root)
            if not merkle.is_included(leaf, event.number - 1, head.size, path, root):
                raise InvalidError(f"event {event.number} is not in the ledger")
        if [e.number for e in receipt.events] != sorted({e.number for e in receipt.events}):
            raise InvalidError("its events are not in their order")
        told = told_by((event.number, event.at, content(event)) for event in receipt.events)
    for name in Told.model_fields:
        if getattr(told, name) != getattr(receipt, name):
            raise InvalidError(f"{name} is not what follows from the ledger's events")


def _check_times(receipt: Receipt) -> None:
    with _or_invalid("its times are not sound"):
        times = [instant(step.at) for step in receipt.states]
        if times != sorted(times):
            raise InvalidError("its times are not in order")
        instant(receipt.due_at)


def _check_gate(receipt: Receipt) -> None:
    """The gate's figures give its verdict, and a model that was taken had passed it, or somebody answers for it."""
    gate = receipt.gate
    if gate is None:
        return
    with _or_invalid("the gate's figures are not sound"):
        is_taken, is_passed = receipt.state == State.COMPLETED, gate["passed"]
        has_figures = gate.keys() != DESTROYED
        if has_figures and gate_reason(gate) != gate["reason"]:
            raise InvalidError("the gate's verdict does not follow from its figures")
        if is_passed is not (gate["reason"] == "") or (is_passed and not is_taken):
            raise InvalidError("the gate's verdict is not what became of the model")
        if is_taken and not has_figures:
            raise InvalidError("the model was taken although the gate has no figures of it")
        if is_taken and not is_passed and not receipt.accepted_by:
            raise InvalidError("the model was taken although the gate refused it, and nobody answers for that")


def check_continues(run: Run, log: Path) -> None:
    """Raise InvalidError unless a run's ledger continues what a head that was kept elsewhere stands for."""
    with _or_invalid(f"{log} cannot be read"):
        kept = Head.model_validate_json(log.read_bytes())
        if not kept.is_signed:
            raise InvalidError(f"{log} is not signed")
        leaves = [bytes.fromhex(event["hash"]) for event in run.ledger.events()[: kept.size]]
        if len(leaves) < kept.size or merkle.root(leaves).hex() != kept.root:
            raise InvalidError(f"the ledger does not continue the {kept.size} events of {log}")


def _check_log(receipt: Receipt, log: Path) -> None:
    """The ledger continues what the receipt's head stands for; a head alone can only be of the same events.

    Raises:
        InvalidError: it does not, or has events of the request that the receipt leaves out.
        UserError: nobody can say whether it does.
    """
    head = receipt.head
    with _or_invalid(f"{log} cannot be read"):
        if log.suffix == ".json":
            kept = Head.model_validate_json(log.read_bytes())
            if not kept.is_signed or kept.key != head.key:
                raise InvalidError(f"{log} is not signed with the key {head.key} of the ledger")
            if kept.size != head.size:
                raise UserError(
                    f"{log} stands for {kept.size} events, and the receipt for {head.size}: no head alone shows that "
                    "the one ledger continues the other. Ask for the run's ledger.sqlite, and give that as --log"
                )
            if kept.root != head.root:
                raise InvalidError(f"{log} stands for other events")
            return
        try:
            with closing(sqlite3.connect(f"file:{log}?mode=ro", uri=True)) as db:
                rows = db.execute("SELECT at, event FROM events ORDER BY number").fetchall()
        except sqlite3.Error as error:
            raise InvalidError(f"{log} cannot be read: {error}") from error
        rows = rows[: head.size]
        leaves, events = [merkle.leaf(entry(*row)) for row in rows], [json.loads(event) for _, event in rows]
        _check_whole(receipt, leaves, events, str(log))


def _check_whole(receipt: Receipt, leaves: list[bytes], events: list[dict[str, Any]], log: str) -> None:
    """The receipt's head is of these events, and the receipt has exactly those that concern its request."""
    if len(leaves) < receipt.head.size or merkle.root(leaves).hex() != receipt.head.root:
        raise InvalidError(f"{log} does not hold the events that the receipt's head stands for")
    wanted, found = brought(events, receipt.request), [event.number for event in receipt.events]
    if missing := sorted({*wanted} - {*found}):
        raise InvalidError(f"it leaves out event {missing[0]} of {log}, which concerns its request")
    if wanted != found:
        raise InvalidError(f"it has other events than those of {log} that concern its request")


def check_of_run(run: Run, data: bytes, *, key: str = "") -> None:
    """A receipt is valid, and whole by the run's ledger."""
    receipt = verified(data, key=key)
    events = run.ledger.events()[: receipt.head.size]
    _check_whole(receipt, [bytes.fromhex(event["hash"]) for event in events], events, "the ledger")
