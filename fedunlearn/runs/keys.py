"""Keys: of runs, which sign what happened, and of clients, which sign what they ask for.

Keys made here are Ed25519. A client may have an elliptic-curve key in their place, as SuperNodes authenticate with. Its
id is the public key in hexadecimal digits (of a curve the compressed point), so that whoever has the id can check a
signature. A run's private key is a file `keys/<id>.pem` of a state folder.
"""

import os
import re
from pathlib import Path
from typing import TypeGuard

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedunlearn.errors import UserError
from fedunlearn.runs.files import make_folder, sync
from fedunlearn.schema import KEY_ID

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
SIGNATURE = r"([0-9a-f]{2}){8,160}"
CURVES: dict[int, tuple[ec.EllipticCurve, hashes.HashAlgorithm]] = {
    33: (ec.SECP256R1(), hashes.SHA256()),
    49: (ec.SECP384R1(), hashes.SHA384()),
    67: (ec.SECP521R1(), hashes.SHA512()),
}
"""By the bytes of an id, the curve of the key and the hash that is signed."""


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


def load(file: Path) -> PrivateKey:
    """Read a private key, in PEM or as OpenSSH writes it.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    try:
        data = file.read_bytes()
        is_openssh = b"BEGIN OPENSSH PRIVATE KEY" in data
        read = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
        key = read(data, password=None)
    except OSError as error:
        raise UserError(f"the private key {file} cannot be read ({error.strerror}): put back a copy of it") from error
    except TypeError as error:
        raise UserError(f"{file} has a password: `ssh-keygen -p -f COPY` takes it off a copy") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{file} is no private key") from error
    names = {curve.name for curve, _ in CURVES.values()}
    if isinstance(key, Ed25519PrivateKey) or (isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in names):
        return key
    raise UserError(f"{file} is neither an Ed25519 key nor one of P-256, P-384 or P-521: `fedunlearn keys new`")


def id_of(key: PrivateKey) -> str:
    """Give a key's id: its public key in hexadecimal digits."""
    return _id_of(key.public_key())


def _id_of(key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> str:
    if isinstance(key, Ed25519PublicKey):
        return key.public_bytes_raw().hex()
    point = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    return key.public_bytes(*point).hex()


def public_id(data: bytes) -> str:
    """Give the id of a public key, in PEM or as OpenSSH writes it; nothing where it is none."""
    is_openssh = data.lstrip().startswith((b"ssh-", b"ecdsa-"))
    read = serialization.load_ssh_public_key if is_openssh else serialization.load_pem_public_key
    try:
        key = read(data)
    except (ValueError, UnsupportedAlgorithm):
        return ""
    found = _id_of(key) if isinstance(key, Ed25519PublicKey | ec.EllipticCurvePublicKey) else ""
    return found if is_id(found) else ""


def id_in(file: Path) -> str:
    """Give the id of the key in a file, be it a public or a private one.

    Raises:
        UserError: there is none.
    """
    try:
        found = public_id(file.read_bytes())
    except OSError:
        found = ""
    return found or id_of(load(file))


def is_id(found: object) -> TypeGuard[str]:
    """Say whether something is an id of a key."""
    return isinstance(found, str) and bool(re.fullmatch(KEY_ID, found))


def signature_of(key: PrivateKey, message: bytes) -> str:
    """Sign a message; gives the signature in hexadecimal digits (ECDSA's in DER)."""
    if isinstance(key, Ed25519PrivateKey):
        return key.sign(message).hex()
    _, digest = CURVES[len(id_of(key)) // 2]
    return key.sign(message, ec.ECDSA(digest)).hex()


def is_signed(signature: object, message: bytes, key_id: object) -> bool:
    """Say whether a signature, in hexadecimal digits, is that key's under the message; what is none is not."""
    if not isinstance(signature, str) or not re.fullmatch(SIGNATURE, signature) or not is_id(key_id):
        return False
    public, signed = bytes.fromhex(key_id), bytes.fromhex(signature)
    try:
        if len(public) in CURVES:
            curve, digest = CURVES[len(public)]
            ec.EllipticCurvePublicKey.from_encoded_point(curve, public).verify(signed, message, ec.ECDSA(digest))
        else:
            Ed25519PublicKey.from_public_bytes(public).verify(signed, message)
    except (InvalidSignature, ValueError):
        return False
    return True
