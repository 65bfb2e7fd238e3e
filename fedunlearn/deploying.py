"""Commands about real machines: `fedunlearn deploy check` says what a machine lacks before it takes part."""

import re
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedunlearn.commands import in_one_line
from fedunlearn.errors import UserError, printable
from fedunlearn.naming import for_shell

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from fedunlearn.data.folders import Listed

deploy_cli = typer.Typer(help="Prepare real machines.", no_args_is_help=True)

SOON = timedelta(days=30)
"""How long a certificate should hold."""
AHEAD, BEHIND = 5.0, 300.0
"""Seconds that a SuperNode's clock may differ from the SuperLink's, by Flower 1.41."""
CLOCK = "set this machine's clock"
READ_AT_ONCE = 256
"""Images."""

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
    read: Annotated[bool, typer.Option("--read", help="Open every image of these folders.")] = False,
) -> int:
    """Say what is there and what is missing: certificates, keys, folders, the SuperLink, versions.

    The exit status is 0 if nothing is missing, else 1.
    """
    parts: list[Callable[[], Found]] = [lambda: certificates(folder / "certificates")]
    if client:
        parts.append(lambda: key_of(folder / "keys" / client))
    if images:
        parts.append(lambda: images_in(images, client, read=read))
    if held_out:
        parts.append(lambda: images_in(held_out, "", read=read))
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
    if not file.exists():
        raise UserError(f"{file} is not here: copy it from the SuperLink's machine, where `certificates.sh` makes it")
    authority = x509.load_pem_x509_certificate(file.read_bytes())
    yield _holds(file, authority)
    if not (folder / "server.key").exists():
        return
    file = folder / "server.pem"
    server = x509.load_pem_x509_certificate(file.read_bytes())
    yield _holds(file, server)
    try:
        server.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        yield False, f"{file} is not by the authority of ca.crt: `certificates.sh` makes another"


def _holds(file: Path, certificate: "Certificate") -> tuple[bool, str]:
    """Say from when until when a certificate holds, as far as that matters now."""
    now, since, until = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    another = f"{until:%Y-%m-%d}: `certificates.sh` makes another on the SuperLink's machine"
    if now < since:
        return False, f"{file} holds from {since:%Y-%m-%d %H:%M} UTC on, and here it is {now:%Y-%m-%d %H:%M}: {CLOCK}"
    if now > until:
        return False, f"{file} has held until {another}"
    return True, f"{file} holds until {another if until < now + SOON else f'{until:%Y-%m-%d}'}"


def key_of(file: Path) -> Found:
    """Look at a SuperNode's private key: its kind, its id, and who can read it."""
    from fedunlearn.runs import keys

    if not file.exists():
        raise UserError(f"{file} is not here: `key.sh {for_shell(file.name)}` makes it")
    key_id = keys.id_of(keys.load(file))
    is_curve = len(key_id) // 2 in keys.CURVES
    yield is_curve, f"{file} has the id {key_id}" + ("" if is_curve else ", and SuperNodes need ECDSA: `key.sh`")
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield False, f"{file} can be read by others: chmod 600 {for_shell(str(file))}"


def images_in(folder: Path, client: str, *, read: bool = False) -> Found:
    """Count the images of a client, or those that are held out, by class; `read` opens them."""
    from fedunlearn.data.folders import of_machine

    if not folder.is_absolute():
        raise UserError(f"{folder} is no absolute path: {folder.absolute()}?")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give that of the images, CLASS/image.png")
    found = of_machine(folder, [client] if client else [])
    listed = found.images[client] if client else found.common
    counts = Counter(image.label for image in listed)
    whose = f"client {client}" if client else "nobody, held out"
    by_class = ", ".join(f"{k} {n}" for k, n in sorted(counts.items()))
    yield True, f"{folder}: {len(listed)} images of {whose} ({by_class})"
    if not client and len(counts) < 2:
        yield False, f"{folder} has one class: held-out images of every class are needed"
    if read:
        yield readable(folder, listed)


def readable(folder: Path, images: list["Listed"]) -> tuple[bool, str]:
    """Open every image, and name those that are damaged."""
    from fedunlearn.data.images import ImageReader, Reading

    reader = ImageReader(Reading(), total=len(images))
    for begin in range(0, len(images), READ_AT_ONCE):
        some = images[begin : begin + READ_AT_ONCE]
        reader.read((folder / image.file for image in some), len(some))
    reader.conclude()
    return True, f"{folder}: every image can be read"


def called(address: str, authority: Path, *, patience: float = 10.0) -> Found:
    """Call the SuperLink, check its certificate, and compare its clock with that of this machine."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UserError(f"--superlink {address} is no HOST:PORT")
    if not authority.exists():
        return  # that was said
    context = ssl.create_default_context(cafile=str(authority))
    try:
        with (
            socket.create_connection((host, int(port)), timeout=patience) as connection,
            context.wrap_socket(connection, server_hostname=host) as secure,
        ):
            yield True, f"{address} answers with {secure.version()}, and its certificate is by this authority"
            yield from _clock(secure, host)
    except ssl.SSLCertVerificationError as error:
        yield False, f"{address}: {_distrust(error, host)}"
    except ssl.SSLError as error:
        yield False, f"{address} does not speak TLS ({error.reason}): is that the SuperLink's port?"
    except OSError as error:
        reason = error.strerror or error
        yield False, f"{address} does not answer ({reason}): is the SuperLink started, and no firewall between?"


def _distrust(error: ssl.SSLCertVerificationError, host: str) -> str:
    """Say what to do where a certificate is not trusted, by OpenSSL's numbers of what can be wrong."""
    if error.verify_code in (9, 10):
        return f"{error.verify_message}: {CLOCK}, or `certificates.sh` makes another"
    if error.verify_code in (62, 64):
        another = f"`certificates.sh {host}` on its machine, then start it again"
        return f"the SuperLink's certificate is not for {host}: {another}"
    return f"its certificate is not by the authority of ca.crt ({error.verify_message}): copy the SuperLink's ca.crt"


def _clock(secure: ssl.SSLSocket, host: str) -> Found:
    """Compare clocks: a SuperLink takes nothing that seems to be of its future, or that was signed long ago."""
    answer = b""
    with suppress(OSError):  # another kind of server, which says nothing
        secure.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = secure.recv(4096)
    if not (found := re.search(rb"(?im)^date: *(.+?)\r?$", answer)):
        return
    ahead = (datetime.now(UTC) - parsedate_to_datetime(found[1].decode())).total_seconds()
    said = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
    is_good = -BEHIND < ahead < AHEAD
    yield is_good, said if is_good else f"{said}, which refuses SuperNodes then: {CLOCK}"
