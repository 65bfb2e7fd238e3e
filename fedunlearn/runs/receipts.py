"""Writes receipts: a signed statement for every request that has ended, beside it a page for people.

The statement travels in a DSSE envelope (Dead Simple Signing Envelope, v1), in canonical JSON (RFC 8785).
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import rfc8785
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signature  # pyright: ignore[reportPrivateImportUsage]

from fedunlearn.config import Config
from fedunlearn.runs import keys
from fedunlearn.runs.events import Head
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.ledger import Request, State
from fedunlearn.runs.page import rendered
from fedunlearn.runs.run import Run
from fedunlearn.runs.signed import SignedRequest
from fedunlearn.runs.statement import (
    ENDED,
    Event,
    Later,
    Receipt,
    Statement,
    brought,
    content,
    finite,
    told_by,
)

PAYLOAD_TYPE = "application/vnd.in-toto+json"
FOLDER = "receipts"
DOES_NOT_PROVE = [
    "That nothing of the clients is left in the model: forgetting is approximate with every strategy but retrain.",
    "That figures are true which others measured: a client that lies about its own images is not found out.",
    "That bytes are gone from the disk: files are unlinked, not overwritten, and other programs may have copies.",
    "What the operator says of itself: run, names, settings, examples, rounds and later figures.",
    "That there is no copy of an earlier model elsewhere, as in forks, studies, backups and downloads.",
    "When something happened: the times are those of the server's clock.",
    "That no event of the request was left out: only the run's ledger shows that (--log ledger.sqlite).",
    "Who holds the run's key: compare its id with one that you got in another way.",
]


def write_all(run: Run, *, renew: bool = False) -> list[Path]:
    """Write the receipts of requests that have ended and have none yet; gives the files.

    Args:
        run: that is open.
        renew: write further ones too, for models that were measured after more rounds.
    """
    is_study = not (run.folder / "run.json").exists()  # where nobody asked anything
    if is_study or not run.ledger.requests():
        return []
    with _alone(run):
        return write_due(run) + (write_further(run) if renew else [])


def cancel(run: Run, request_id: str, *, signed: SignedRequest | None = None) -> Request:
    """Take a request back as `Run.cancel` does, and write its receipt."""
    cancelled = run.cancel(request_id, signed=signed)
    write_all(run)
    return cancelled


@contextmanager
def _alone(run: Run) -> Iterator[None]:
    """Let one process at a time write receipts of a run."""
    folder = run.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_due(run: Run) -> list[Path]:
    """Write a receipt for every request that has ended and has none about how it stands now; gives the files."""
    due = [r for r in run.ledger.requests() if r.state in ENDED and not run.ledger.is_told(r)]
    return [write(run, request, _later(run, request)) for request in due]


def write_further(run: Run) -> list[Path]:
    """Write a further receipt for every completed request whose model has been measured since; gives the files."""
    written = []
    for request in run.ledger.requests():
        later = _later(run, request)
        if later and run.ledger.receipts(request.id)[-1:] != [(request.state, later.round)]:
            written.append(write(run, request, later))
    return written


def write(run: Run, request: Request, later: Later | None = None) -> Path:
    """Write a receipt as it is now; an earlier one stays as it is."""
    number = len(run.ledger.receipts(request.id)) + 1
    file = run.folder / FOLDER / f"{request.id}{f'-{number}' if number > 1 else ''}.json"
    receipt = made(run, request, later)
    data = signed(statement_of(receipt), keys.file_of(run.ledger.keys, receipt.head.key))
    write_atomically(file, data)
    page = rendered("fedunlearn.runs", "receipt.html.jinja", receipt=receipt, file=file.name)
    write_atomically(file.with_suffix(".html"), page.encode())
    sha256 = hashlib.sha256(data).hexdigest()
    run.ledger.keep_receipt(request, file.name, sha256, round_=later.round if later else None)
    return file


def made(run: Run, request: Request, later: Later | None = None) -> Receipt:
    """Put together what a receipt says."""
    packages, rounds = packages_sha256(), _rounds(run, request)  # they take a while, in which the ledger may go on
    events, head = _events(run, request)
    told = told_by((event.number, event.at, content(event)) for event in events)
    about, examples, names = run.about(), run.ledger.examples(), run.names()
    named = [*request.portions, *request.along, *(request.owners if run.config.partition.names else [])]
    return Receipt(
        **told.model_dump(),
        run=run.name,
        names={str(client): names[client] for client in named},
        examples={str(client): examples[client] for client in sorted(request.covered) if client in examples},
        rounds=rounds,
        settings=finite(_settings(run.config)),
        data=hashlib.sha256(rfc8785.dumps(about["data"])).hexdigest(),
        versions=about["versions"],
        packages_sha256=packages,
        does_not_prove=DOES_NOT_PROVE,
        later=later,
        events=events,
        head=head,
    )


def statement_of(receipt: Receipt) -> Statement:
    """Make a receipt a statement about the model that it left."""
    model = receipt.after
    subject = [{"name": model.checkpoint, "digest": {"sha256": model.sha256}}] if model else []
    return Statement.model_validate({"subject": subject, "predicate": receipt.model_dump()})


def signed(statement: Statement, key: Path) -> bytes:
    """Put a statement into an envelope, signed with a key."""
    return as_file(sign(Envelope(rfc8785.dumps(statement.model_dump(by_alias=True)), PAYLOAD_TYPE, {}), key))


def sign(envelope: Envelope, key: Path) -> Envelope:
    """Add a signature to an envelope; its `keyid` is the public key."""
    private = keys.load(key)
    key_id = keys.id_of(private)
    envelope.signatures[key_id] = Signature(key_id, keys.signature_of(private, envelope.pae()))
    return envelope


def as_file(envelope: Envelope) -> bytes:
    """Write an envelope, in the one way in which it is written."""
    content = envelope.to_dict()
    content["signatures"] = sorted(content["signatures"], key=lambda signature: signature["keyid"])
    return rfc8785.dumps(content) + b"\n"


@cache
def packages_sha256() -> str:
    """Give the SHA-256 of the sorted names and versions of all installed packages, as `numpy==2.4.6`, one a line."""
    found = sorted({f"{one.metadata['Name']}=={one.version}".lower() for one in distributions()})
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _settings(config: Config) -> dict[str, Any]:
    """The settings of a run without those that say where it lies, and what others ask for."""
    forget = config.forget.model_copy(update={"keys": {}, "schedule": {}})
    data = config.data.model_copy(update={"root": ""})
    split = config.partition.model_copy(update={"names": [], "file": "", "keys": {}})
    others = {"home": "", "run": "", "forget": forget, "data": data, "partition": split}
    return json.loads(config.model_copy(update=others).model_dump_json())


def _events(run: Run, request: Request) -> tuple[list[Event], Head]:
    """The steps of a request, with the commit that it found and the one that applied it; and the head over all."""
    found, head = run.ledger.evidence(lambda events: brought(events, request.id))
    return [Event(number=n, at=at, text=text, proof=proof) for n, at, text, proof in found], head


def _rounds(run: Run, request: Request) -> int | None:
    """The rounds before the request in which one of the clients was trained on, where the metrics say who was."""
    last = request.detail.get("round", math.inf)
    rounds = [row for row in run.metrics() if row["kind"] == "round" and "clients" in row and row["round"] <= last]
    if not all(isinstance(row["clients"], list) for row in rounds):
        return None
    return sum(bool(set(row["clients"]) & set(request.owners)) for row in rounds)


def _later(run: Run, request: Request) -> Later | None:
    """What was measured last, if that was after the request was completed."""
    rows = [row for row in run.metrics() if row["kind"] == "round" and "test" in row]
    if request.state != State.COMPLETED or not rows or rows[-1]["round"] <= request.detail["completed_round"]:
        return None
    row = rows[-1]
    figures = {"retain clients": row["retain"]["class"], "held-out images": row["test"]["class"]}
    for client in map(str, request.clients):
        if client in row.get("forgotten", {}):
            figures[f"client {client}"] = row["forgotten"][client]["class"]
    return Later(round=row["round"], figures={name: value for name, value in figures.items() if value == value})
