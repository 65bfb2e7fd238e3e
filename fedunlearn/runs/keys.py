"""Ed25519 keys: of runs, which sign what happened, and of clients, which sign what they ask for.

A private key is a file `keys/<id>.pem` of a state folder. Its id is the public key in hexadecimal digits, so that
whoever has the id can check a signature.
"""

import os
import re
from pathlib import Path
from typing import TypeGuard

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedunlearn.errors import UserError
from fedunlearn.runs.files import make_folder, sync

ID_BYTES = 32


def new_key(file: Path | None = None, *, folder: Path | None = None) -> str:
    """Make a key and write it where nobody else can read it; returns its id.

    Args:
        file: that must not exist yet; or else
        folder: in which the file is named after the id.

    Raises:
        UserError: the file exists.
    """
    key = Ed25519PrivateKey.generate()
    path = file or file_of(folder or Path(), id_of(key))
    make_folder(path.parent)
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(key.private_bytes(*encoding))
            opened.flush()
            os.fsync(opened.fileno())
    except FileExistsError:
        raise UserError(f"{path} exists already: a key is never overwritten") from None
    sync(path.parent)
    return id_of(key)


def file_of(folder: Path, key_id: str) -> Path:
    """Say where the key of that id lies."""
    return folder / f"{key_id}.pem"


def load(file: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"the private key {file} cannot be read ({error.strerror}): put back a copy of it") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is no private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{file} is not an Ed25519 key: `fedunlearn keys new` makes one")
    return key


def id_of(key: Ed25519PrivateKey) -> str:
    """Give a key's id: its public key in hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def is_id(found: object) -> TypeGuard[str]:
    """Say whether something is an id of a key."""
    return isinstance(found, str) and bool(re.fullmatch(r"[0-9a-f]{64}", found))


def is_signed(signature: object, message: bytes, key_id: object) -> bool:
    """Say whether a signature, in hexadecimal digits, is that key's under the message; what is none is not."""
    if not isinstance(signature, str) or not re.fullmatch(r"[0-9a-f]{128}", signature) or not is_id(key_id):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key_id)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
