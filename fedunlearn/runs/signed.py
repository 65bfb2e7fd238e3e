"""Signed requests: whoever has a client's key asks, and nobody else.

What is signed names the run by its key, the action, the clients, a span of time and a number that is used once. So a
request cannot be changed, kept for later, repeated or taken to another run.
"""

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import rfc8785

from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.runs import keys

DAYS, MOST_DAYS = 30, 36500  # that a signed request can be filed in
FORGET, CANCEL = "forget", "cancel"


class UnsignedError(UserError):
    """A request does not have the signature that it needs."""


@dataclass(frozen=True)
class SignedRequest:
    """What somebody asks, with a signature.

    Attributes:
        run: id of the run's key.
        action: `forget`, with what is selected of the clients' images (`action_of`); or `cancel` and the id of a
            request.
        clients: whom it is about.
        issued_at: when it was signed.
        expires_at: until when it can be filed.
        nonce: a random number in hexadecimal digits.
        key: id of the key that signed.
        signature: in hexadecimal digits, under all the others in canonical JSON (RFC 8785).
    """

    run: str
    action: str
    clients: list[int]
    issued_at: str
    expires_at: str
    nonce: str
    key: str
    signature: str = ""

    @property
    def message(self) -> bytes:
        """What is signed."""
        return rfc8785.dumps({name: value for name, value in asdict(self).items() if name != "signature"})


def action_of(selection: Selection | None = None) -> str:
    """Say what is asked for, in the one way in which it is signed.

    Args:
        selection: which of the clients' images are to be forgotten; all by default.

    Example:
        >>> action_of(), action_of(Selection((5,)))
        ('forget', 'forget {"classes":[5]}')
    """
    return f"{FORGET} {rfc8785.dumps(selection.content()).decode()}" if selection else FORGET


def sign(clients: Collection[int], *, run: str, key: Path, action: str = FORGET, days: float = DAYS) -> SignedRequest:
    """Sign a request.

    Args:
        clients: whom it is about.
        run: id of the run's key.
        key: the clients' private key.
        action: `forget`, or `cancel` and the id of a request.
        days: that it can be filed in.

    Raises:
        UserError: those are too many, or there is no such key.
    """
    if not 0 <= days <= MOST_DAYS:
        raise UserError(f"a signed request can be filed in 0..{MOST_DAYS} days, not in {days:g}")
    private, now = keys.load(key), datetime.now(UTC)
    until, nonce, owner = now + timedelta(days=days), secrets.token_hex(16), keys.id_of(private)
    asked = SignedRequest(run, action, sorted(set(clients)), now.isoformat(), until.isoformat(), nonce, owner)
    return replace(asked, signature=keys.signature_of(private, asked.message))


def read(data: bytes | Mapping[str, Any]) -> SignedRequest:
    """Read a signed request, from a file or as the ledger has it.

    Raises:
        UnsignedError: it is none.
    """
    try:
        content = dict(data) if isinstance(data, Mapping) else json.loads(data)
        asked = SignedRequest(**content)
        is_sound = all(type(client) is int and 0 <= client < 2**32 for client in asked.clients)
        is_sound &= all(isinstance(value, str) for name, value in content.items() if name != "clients")
        for time in (asked.issued_at, asked.expires_at):
            is_sound &= datetime.fromisoformat(time).tzinfo is not None
        is_sound &= bool(asked.message)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UnsignedError(f"this is no signed request: {error}") from error
    if not is_sound:
        raise UnsignedError("this is no signed request: clients are numbers, and times have a zone")
    return asked


def check(
    asked: SignedRequest | None,
    clients: Collection[int],
    *,
    run: str,
    owners: Mapping[int, str],
    at: datetime,
    used: Collection[str],
    action: str = FORGET,
    name: Callable[[int], str] = str,
) -> None:
    """Raise UnsignedError unless somebody who may asks for exactly this, in time, for the first time.

    Args:
        asked: what was signed, if anything was.
        clients: that the request is about.
        run: id of the run's key.
        owners: by client, the id of its key.
        at: when the request was filed.
        used: nonces of earlier requests.
        action: that is asked for.
        name: of a client, in words.
    """
    if asked is None:
        raise UnsignedError("it is not signed (forget.signed): --key, or --signed with what a client has signed")
    if not keys.is_signed(asked.signature, asked.message, asked.key):
        raise UnsignedError("its signature is not valid")
    if asked.run != run:
        raise UnsignedError("it was signed for another run")
    if asked.action != action or sorted(set(clients)) != asked.clients:
        whom = ", ".join(f"{name(client)}" for client in asked.clients)
        raise UnsignedError(f"what was signed is to {asked.action} clients [{whom}]")
    for client in asked.clients:
        if owners.get(client) != asked.key:
            raise UnsignedError(f"its key is not that of client {name(client)} (forget.keys, partition.keys)")
    if datetime.fromisoformat(asked.issued_at) > at + timedelta(minutes=10):
        clocks = f"at {asked.issued_at[:16]}, when it was {at.isoformat()[:16]} here: set the clocks, and sign anew"
        raise UnsignedError(f"it was signed in the future, {clocks}")
    if at > datetime.fromisoformat(asked.expires_at):
        raise UnsignedError(f"it has expired on {asked.expires_at[:16]}: sign anew")
    if asked.nonce in used:
        raise UnsignedError("it was filed before")
