"""Commands about real machines: `fedunlearn deploy check` says what a machine lacks before it takes part."""

import socket
import ssl
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from fedunlearn.commands import in_one_line
from fedunlearn.errors import UserError, printable

deploy_cli = typer.Typer(help="Prepare real machines.", no_args_is_help=True)

SOON = timedelta(days=30)
"""How long a certificate should hold."""

Found = Iterator[tuple[bool, str]]


@deploy_cli.callback()
def _several() -> None:
    """Let `check` be named, though it is the only command."""


@deploy_cli.command()
@in_one_line
def check(
    folder: Annotated[Path, typer.Argument(help="The machine's folder, with certificates/ and keys/.")] = Path(
        "deployment"
    ),
    superlink: Annotated[str, typer.Option(help="Address of the SuperLink, HOST:PORT; it is called.")] = "",
    client: Annotated[str, typer.Option(help="The client whose SuperNode this machine starts.")] = "",
    images: Annotated[Path | None, typer.Option(help="Folder of the client's images, CLASS/image.png.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Folder of the server's held-out images.")] = None,
) -> int:
    """Say what is there and what is missing: certificates, keys, folders, the SuperLink, versions.

    The exit status is 0 if nothing is missing, else 1.
    """
    parts: list[Callable[[], Found]] = [lambda: certificates(folder / "certificates")]
    if client:
        parts.append(lambda: key_of(folder / "keys" / client))
    if images:
        parts.append(lambda: images_in(images, client))
    if held_out:
        parts.append(lambda: images_in(held_out, ""))
    if superlink:
        parts.append(lambda: called(superlink, folder / "certificates" / "ca.crt"))
    print(", ".join(f"{name} {version(name)}" for name in ("fedunlearn", "flwr", "torch")) + " (the same everywhere)")
    is_complete = True
    for part in parts:
        for is_good, line in answers(part):
            is_complete &= is_good
            print(f"{'ok      ' if is_good else 'MISSING '} {printable(line)}")
    return 0 if is_complete else 1


def answers(part: Callable[[], Found]) -> Found:
    """Give what a check finds; an error that a person can put right is one more finding."""
    try:
        yield from part()
    except (UserError, OSError, ValueError) as error:
        yield False, str(error)


def certificates(folder: Path) -> Found:
    """Look at the authority's certificate, and at the SuperLink's where its key is here."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    file = folder / "ca.crt"
    authority = x509.load_pem_x509_certificate(file.read_bytes())
    yield _holds(file, authority.not_valid_after_utc)
    if not (folder / "server.key").exists():
        return
    file = folder / "server.pem"
    server = x509.load_pem_x509_certificate(file.read_bytes())
    yield _holds(file, server.not_valid_after_utc)
    try:
        server.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        yield False, f"{file} is not by the authority of ca.crt: `certificates.sh` makes another"


def _holds(file: Path, until: datetime) -> tuple[bool, str]:
    return until > datetime.now(UTC) + SOON, f"{file} holds until {until:%Y-%m-%d}"


def key_of(file: Path) -> Found:
    """Look at a SuperNode's private key: its kind, its id, and who can read it."""
    from fedunlearn.runs import keys

    key_id = keys.id_of(keys.load(file))
    is_curve = len(key_id) // 2 in keys.CURVES
    yield is_curve, f"{file} has the id {key_id}" + ("" if is_curve else ", and SuperNodes need ECDSA: `key.sh`")
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield False, f"{file} can be read by others: chmod 600 {file}"


def images_in(folder: Path, client: str) -> Found:
    """Count the images of a client, or those that are held out, by class."""
    from fedunlearn.data.folders import of_machine

    if not folder.is_absolute() or not folder.is_dir():
        raise UserError(f"{folder} is no folder by its absolute path")
    found = of_machine(folder, [client] if client else [])
    listed = found.images[client] if client else found.common
    counts = Counter(image.label for image in listed)
    whose = f"client {client}" if client else "nobody, held out"
    yield (
        True,
        f"{folder}: {len(listed)} images of {whose} ({', '.join(f'{k} {n}' for k, n in sorted(counts.items()))})",
    )
    if not client and len(counts) < 2:
        yield False, f"{folder} has one class: held-out images of every class are needed"


def called(address: str, authority: Path, *, patience: float = 10.0) -> Found:
    """Call the SuperLink, and check its certificate."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--superlink {address} is no HOST:PORT")
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with (
            socket.create_connection((host, int(port)), timeout=patience) as connection,
            context.wrap_socket(connection, server_hostname=host) as secure,
        ):
            yield True, f"{address} answers with {secure.version()}, and its certificate is by this authority"
    except ssl.SSLCertVerificationError as error:
        yield False, f"{address}: {error.verify_message}"
    except OSError as error:
        yield False, f"{address} does not answer ({error.strerror or error})"
