"""What a machine of its own writes down: in which runs it takes part, for which clients, and what these have signed.

It lies in the folder `taking-part` of the machine's own state folder. A machine knows a run by the id of its key alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from logging import getLogger
from pathlib import Path

from fedunlearn.errors import UNREADABLE
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.keys import is_id
from fedunlearn.runs.signed import SignedRequest, UnsignedError, read

FOLDER = "taking-part"
MOST = 16
"""Signed requests that a reply carries."""
LONGEST = 2000
"""Characters of a signed request; with the longest signature it has some 900."""

log = getLogger("fedunlearn")


@dataclass(frozen=True)
class TakingPart:
    """One run that a machine takes part in.

    Attributes:
        run: id of the run's key.
        clients: names of the machine's clients, by the numbers that they have in the run.
        since: when that was written down.
        signers: by client, the id of the key whose signature the run believes; empty where it believes none.
    """

    run: str
    clients: dict[int, str]
    since: str
    signers: dict[int, str] = field(default_factory=dict)


def note(home: Path, run: str, clients: Mapping[int, str], signers: Mapping[int, str]) -> None:
    """Write down for which clients this machine takes part in a run, where it is not written there yet.

    Args:
        home: the machine's own state folder.
        run: id of the run's key.
        clients: names by number.
        signers: the id of the key that must sign, by client; of others than `clients` none is kept.
    """
    file, now = home / FOLDER / f"{run}.json", datetime.now(UTC).isoformat()
    found = TakingPart(run, dict(clients), now, {client: signers[client] for client in clients if client in signers})
    known = _read_note(file)
    if known is None or replace(known, since=now) != found:
        write_atomically(file, json.dumps(asdict(found), indent=2).encode())


def noted(home: Path) -> list[TakingPart]:
    """List the runs that this machine takes part in, the earliest first; files that say none are named."""
    files = [file for file in (home / FOLDER).glob("*.json") if is_id(file.stem)]
    found = {file: _read_note(file) for file in files}
    for file in (file for file, one in found.items() if one is None):
        log.warning("%s cannot be read, or is damaged: the next start of the run writes it anew", file)
    return sorted((one for one in found.values() if one), key=lambda one: (one.since, one.run))


def keep(home: Path, asked: SignedRequest) -> Path:
    """Put what a client has signed where the replies to its run carry it; an earlier one of the client is replaced."""
    file = home / FOLDER / f"{asked.run}-{asked.clients[0]}.json"
    write_atomically(file, json.dumps(asdict(asked), indent=2).encode())
    file.chmod(0o644)  # root may ask, and another user run the SuperNode
    return file


def kept(home: Path, run: str) -> list[SignedRequest]:
    """Give what clients have signed for a run and what can still be filed, the newest first."""
    found = [_read_signed(file) for file in (home / FOLDER).glob(f"{run}-*.json")]
    now = datetime.now(UTC)
    there = [one for one in found if one and one.run == run and datetime.fromisoformat(one.expires_at) > now]
    return sorted(there, key=lambda one: datetime.fromisoformat(one.issued_at), reverse=True)


def _read_note(file: Path) -> TakingPart | None:
    try:
        found = TakingPart(**json.loads(file.read_bytes()))
        clients, signers = ({int(number): text for number, text in of.items()} for of in (found.clients, found.signers))
        texts = (found.since, *clients.values(), *signers.values())
        if found.run == file.stem and all(isinstance(text, str) for text in texts):
            return TakingPart(found.run, clients, found.since, signers)
    except (OSError, *UNREADABLE):
        pass
    return None


def _read_signed(file: Path) -> SignedRequest | None:
    try:
        return read(file.read_bytes())
    except (OSError, UnsignedError):
        return None
