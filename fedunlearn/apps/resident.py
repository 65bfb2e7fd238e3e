"""A process that stays on a machine between messages: to import torch and read images takes longer than most work.

Whoever has a message looks for the process in a file that says where it listens, on this machine alone, and with which
key. It ends with the process that starts apps on this machine, and when nobody has asked anything for a while.
"""

import hashlib
import json
import os
import pkgutil
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from logging import getLogger
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.lock import lock

IDLE_SECONDS = 900.0
START_SECONDS = 120.0
LOOPBACK = "127.0.0.1"

log = getLogger("fedunlearn")

_started: list[subprocess.Popen] = []
"""Processes that this one has started and does not wait for."""


def answer(message: Message, context: Context, app: str, folder: Path, *, idle: float = IDLE_SECONDS) -> Message:
    """Have a message answered by the process of an app on this machine; it is started where there is none.

    Args:
        app: the client app, as `module:name`.
        folder: where its file is.
        idle: seconds without a message after which a process that is started now ends.

    Raises:
        UserError: the process could not be started, ended before it had answered, or the app has failed.
    """
    parent = os.getppid()
    about = json.dumps([app, sys.path, parent])  # apps of other folders have other modules
    file = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    with _connection(file, [app, str(parent), str(idle)]) as connection:
        connection.send((message, context))
        try:
            answered = connection.recv()
        except EOFError:
            raise UserError("the process that works on this machine's messages ended before it had answered") from None
    if isinstance(answered, UserError):
        raise answered
    return answered


def _connection(file: Path, arguments: list[str]) -> Connection:
    """Connect to the process of a file, and start it where there is none."""
    while True:
        with lock(file.with_suffix(""), patience=START_SECONDS):
            if not file.exists():
                _start(file, arguments)
        try:
            listens = json.loads(file.read_bytes())
            os.kill(listens["pid"], 0)
            return Client((LOOPBACK, listens["port"]), authkey=bytes.fromhex(listens["key"]))
        except (OSError, EOFError, AuthenticationError):  # it was killed, and another process may have its number
            file.unlink(missing_ok=True)


def _start(file: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", __name__, str(file), *arguments]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    _started.append(process)
    deadline = time.monotonic() + START_SECONDS
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError("the process that works on this machine's messages does not start: see the lines above")
        time.sleep(0.05)


@cache
def app_of(reference: str) -> ClientApp:
    """Import an app that is named as `module:name`."""
    return pkgutil.resolve_name(reference)


class Watch(threading.Thread):
    """Ends this process, and removes its file, when nobody can want anything of it any more.

    Args:
        file: that says where this process listens.
        parent: id of the process with which this one ends.
        idle: seconds without a message after which it ends.
    """

    def __init__(self, file: Path, parent: int, idle: float) -> None:
        super().__init__(daemon=True)
        self._file, self._parent, self._idle = file, parent, idle
        self._asker: Connection | None = None
        self._since = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def busy(self, asker: Connection) -> Iterator[None]:
        """Keep the process for as long as whoever has asked waits for an answer."""
        self._is_asked(asker)
        try:
            yield
        finally:
            self._is_asked(None)

    def _is_asked(self, asker: Connection | None) -> None:
        with self._lock:
            self._asker, self._since = asker, time.monotonic()

    def run(self) -> None:
        """Look once a second."""
        while self._is_wanted():
            time.sleep(1)
        self._file.unlink(missing_ok=True)
        os._exit(0)

    def _is_wanted(self) -> bool:
        with self._lock:
            try:
                os.kill(self._parent, 0)
                if self._asker is None:
                    return time.monotonic() - self._since < self._idle
                return not self._asker.poll()  # whoever waits for an answer says nothing more, unless it is gone
            except OSError:
                return False


def main(file: str, app: str, parent: str, idle: str) -> None:
    """Answer messages, one after another."""
    set_up()
    answers, key = app_of(app), secrets.token_bytes(32)
    with Listener((LOOPBACK, 0), backlog=64, authkey=key) as listener:
        watch = Watch(Path(file), int(parent), float(idle))
        watch.start()
        about = {"pid": os.getpid(), "port": listener.address[1], "key": key.hex()}
        write_atomically(Path(file), json.dumps(about).encode())  # for its owner alone
        while True:
            with suppress(OSError, EOFError, AuthenticationError), listener.accept() as asker:
                message, context = asker.recv()
                with watch.busy(asker):
                    asker.send(_answer(answers, message, context))


def _answer(app: ClientApp, message: Message, context: Context) -> Message | UserError:
    try:
        return app(message, context)
    except UserError as error:
        return error
    except Exception as error:
        log.exception("the client app failed")
        return UserError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
