"""Serve the page until a signal ends it."""

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import uvicorn

from fedunlearn.apps.serve.guard import Guard, is_loopback, names_of
from fedunlearn.apps.serve.jobs import Jobs
from fedunlearn.apps.serve.site import Site
from fedunlearn.apps.signals import stopped_by_signals
from fedunlearn.errors import UserError

MOST_CONNECTIONS = 100

log = getLogger("fedunlearn")


class Server(uvicorn.Server):
    """Leaves signals to the command, which ends at once: pages that listen would be waited for otherwise."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def serve(home: Path, *, host: str, port: int, options: list[str]) -> None:
    """Serve the page of a state folder.

    Args:
        home: state folder.
        host: a name or an address of this machine; of others than loopback a token is asked for.
        port: 0 takes a free one.
        options: of the commands that apply requests.

    Raises:
        UserError: there is no such address, or the port is taken.
    """
    with listening(host, port) as here:
        server, token = made(home, host=host, port=here.getsockname()[1], options=options)
        log.info("the page of %s is at %s (Ctrl-C ends it)", home, address(host, server.config.port, token))
        if token:
            log.info("whoever has this token can ask for clients to be forgotten; what is sent is not encrypted")
        with stopped_by_signals(lambda: "runs go on; a request that this page was applying stays filed"):
            server.run(sockets=[here])


def made(home: Path, *, host: str, port: int, options: list[str]) -> tuple[Server, str]:
    """Make the server of a page, and the token that a browser must show; none where only this machine reaches it."""
    token = "" if is_loopback(host) else secrets.token_urlsafe(32)
    guarded = Guard(Site(home, Jobs(home, options)).app(), port=port, names=names_of(host), token=token)
    config = uvicorn.Config(
        guarded, port=port, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
        proxy_headers=False, server_header=False, limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    return Server(config), token


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen at an address.

    Raises:
        UserError: nobody can.
    """
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        here = socket.create_server(where[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port} cannot be had ({reason}): --port 0 takes a free port") from error
    with here:
        yield here


def address(host: str, port: int, token: str) -> str:
    """Write the address that a person opens."""
    name = f"[{host}]" if ":" in host else socket.gethostname() if host == "0.0.0.0" else host
    return f"http://{name}:{port}/{f'?token={token}' if token else ''}"
