"""Ctrl-C, SIGTERM and SIGHUP end a command with everything that it started, and it says how to go on."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import psutil

from fedunlearn.log import waiting

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GAVE_UP = 3  # exit status
SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def stopped_by_signals(way_on: Callable[[], str]) -> Iterator[None]:
    """End this process at a signal, with every process that it started, one line and status 128 + signal.

    What is committed is whole at any moment, so nothing has to be tidied up. Signals that are ignored, as SIGHUP is
    under `nohup`, stay so. Outside of the main thread nothing is done, since Python handles signals there alone.

    Args:
        way_on: says what the person can do next.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        end(f"stopped by {signal.Signals(number).name}: {way_on()}", 128 + number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def patience(thing: str, *, limit: float) -> Iterator[None]:
    """Say what is waited for where it takes more than a few seconds, and end the process after `limit` seconds."""
    timer = threading.Timer(limit, lambda: end(f"error: waited {limit:g} s for {thing}, in vain", GAVE_UP))
    timer.daemon = True
    timer.start()
    try:
        with waiting(thing, limit=limit):
            yield
    finally:
        timer.cancel()


@cache  # one watch a process
def ends_with_superlink(line: str) -> None:
    """From now on end this process, and all that it started, within a second of the end of Flower's SuperLink.

    Flower ends it too, a little later, and leaves Ray's processes. Without a SuperLink above it nothing is watched.
    """
    above = [process for process in psutil.Process().parents() if "flower-super" in " ".join(process.cmdline())]

    def watch() -> None:
        while all(map(_is_alive, above)):
            time.sleep(0.1)
        end(line, 1)

    if above:
        threading.Thread(target=watch, daemon=True).start()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(line: str, status: int) -> None:
    """Write a line, kill every process below this one, and end it at once."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        shown = SHOW_CURSOR if os.isatty(2) else ""  # whoever hid it has no chance to show it again
        os.write(2, f"{shown}{line}\n".encode(errors="replace"))  # a buffered stream may be in the middle of a line
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    os._exit(status)
