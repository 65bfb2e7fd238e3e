"""A process that stays on a machine between messages: to import torch and read images takes longer than most work.

Whoever has a message finds the process by a folder that its owner alone can write to. A lock there says whether it
lives, and a file by which socket it listens. It ends with the process that starts apps on this machine, and when nobody
has asked anything for a while.
"""

import hashlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from logging import getLogger
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from tempfile import mkdtemp

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedunlearn.errors import UserError
from fedunlearn.log import set_up
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.lock import ELSEWHERE, LockedError, is_locked, lock

IDLE_SECONDS = 900.0
START_SECONDS = 120.0
PATIENCE = (0.0, 0.5)
"""By attempt, for how many seconds one that lives must keep its lock: that outlasts its sockets a little."""
SOCKET = "socket"
"""Name of the file that says where a process listens, and of what it listens at."""

log = getLogger("fedunlearn")

_started: list[subprocess.Popen] = []
"""Processes that this one has started and does not wait for."""


def answer(message: Message, context: Context, app: str, folder: Path, *, idle: float = IDLE_SECONDS) -> Message:
    """Have a message answered by the process of an app on this machine; it is started where there is none.

    Where the process is ended before it has answered, another one is asked once: a client's work can be repeated.

    Args:
        app: the client app, as `module:name`.
        folder: where the processes of this machine are found.
        idle: seconds without a message after which a process that is started now ends.

    Raises:
        UserError: others can write to the folder, no process could be started, each has ended before it had answered,
            or the app has failed.
    """
    parent = os.getppid()
    about = json.dumps([app, sys.path, parent, platform.node()])  # apps of other folders have other modules
    place = private(folder) / hashlib.sha256(about.encode()).hexdigest()[:16]
    for patience in PATIENCE:
        _start_if_needed(place, [app, str(parent), str(idle)], patience)
        try:
            with Client(os.fsdecode((place / SOCKET).read_bytes())) as connection:
                connection.send((message, context))
                answered = connection.recv()
        except (OSError, EOFError):
            log.warning("the process that works on this machine's messages ended before it had answered")
            continue
        if isinstance(answered, UserError):
            raise answered
        return answered
    raise UserError("two processes ended before they had answered: see the lines above, or is memory short?")


def private(folder: Path) -> Path:
    """Give a folder, made where it is missing: what is found by it is unpickled, so nobody else may write there.

    Raises:
        UserError: somebody may, or it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({error.strerror}): {ELSEWHERE}") from error
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:  # as that of a link is too
        raise UserError(f"{folder} is not used, since others can write there, or it is a link: remove it")
    return folder


def _start_if_needed(place: Path, arguments: list[str], patience: float) -> None:
    if not _is_there(place, patience):
        with lock(place.parent, of=f"the folder {place.parent}", patience=START_SECONDS):
            if not _is_there(place, patience):
                _start(place, arguments)


def _is_there(place: Path, patience: float) -> bool:
    return is_locked(place, patience=patience) and (place / SOCKET).exists()


def _start(place: Path, arguments: list[str]) -> None:
    """Start a process and wait until it listens; what ended ones have left goes."""
    for other in place.parent.iterdir():
        if other.is_dir() and not is_locked(other, patience=0):
            shutil.rmtree(other)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-P", "-m", __name__, str(place), *arguments]
    # what ends everything at this terminal leaves it to the process that starts apps to end
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    _started.append(process)
    deadline = time.monotonic() + START_SECONDS
    while not (place / SOCKET).exists():
        is_starting = process.poll() is None or is_locked(place, patience=0)  # one whose starter was killed
        if not is_starting or time.monotonic() > deadline:
            process.kill()
            raise UserError("the process that works on this machine's messages does not start: see the lines above")
        time.sleep(0.05)


@cache
def app_of(reference: str) -> ClientApp:
    """Import an app that is named as `module:name`."""
    return pkgutil.resolve_name(reference)


class Watch(threading.Thread):
    """Ends this process when nobody can want anything of it any more.

    Args:
        folder: of the socket, which is removed.
        parent: id of the process with which this one ends.
        idle: seconds without a message after which it ends.
    """

    def __init__(self, folder: str, parent: int, idle: float) -> None:
        super().__init__(daemon=True)
        self._folder, self._parent, self._idle = folder, parent, idle
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
        shutil.rmtree(self._folder, ignore_errors=True)
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


def main(place: str, app: str, parent: str, idle: str) -> None:
    """Answer messages, one after another; where another process of the place lives, do nothing."""
    set_up()
    with suppress(LockedError), lock(Path(place)):
        answers, folder = app_of(app), mkdtemp(prefix="fedunlearn-")  # paths of sockets must be short
        address = f"{folder}/{SOCKET}"
        with Listener(address, backlog=64) as listener:
            watch = Watch(folder, int(parent), float(idle))
            watch.start()
            write_atomically(Path(place) / SOCKET, os.fsencode(address))
            while True:
                with suppress(OSError, EOFError), listener.accept() as asker:
                    message, context = asker.recv()
                    with watch.busy(asker):
                        answered = _answer(answers, message, context)
                    asker.send(answered)


def _answer(app: ClientApp, message: Message, context: Context) -> Message | UserError:
    try:
        return app(message, context)
    except UserError as error:
        return UserError(str(error))  # others cannot always be pickled
    except Exception as error:
        log.exception("the client app failed")
        return UserError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
