"""What commands do where files are damaged, or cannot be written: `python -m benchmarks.reliability.storage`, as root.

A run of two rounds with a request that is COMPLETED lies on a tmpfs, with another run beside it. For every damage and
every command it is there anew. `1 line` is what is asked for: a line that names the file and the way out, a status
that is not 0, and no traceback. `done` is a command that did its work all the same. After the damage is undone, the
run must be sound (`fedunlearn verify`), with a model that is not older. Locks and `flock` are simulated in the process.
"""

import argparse
import errno
import fcntl
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.reliability.kill_points import HERE, SMALL, command, draw_nothing, forked
from fedunlearn.runs import database
from fedunlearn.runs.run import Run
from fedunlearn.runs.verifying import problems

COMMANDS = {
    "run": f"run digits rounds=3 run=run {HERE}",
    "forget": f"forget --client 1 --run run {HERE}",
    "requests": "requests --run run",
    "verify": "verify --run run",
    "report": "report --run run",
    "run other": f"run digits run=other {HERE}",
}
TAIL = b'{"kind": "round", "round": 2, "test": {"class": 0.5}}'
Damage = Callable[[Path], object]
Harm = Callable[[], AbstractContextManager[None]]


def with_content(content: bytes) -> Damage:
    """Have a file say something else."""
    return lambda file: file.write_bytes(content)


def cut(file: Path) -> None:
    """Cut a file in half."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def appended(line: bytes) -> Damage:
    """Have a file begin and end with a further line."""
    return lambda file: file.write_bytes(line + b"\n" + file.read_bytes() + line + b"\n")


LEDGER, ABOUT, ROWS = "runs/run/ledger.sqlite", "runs/run/run.json", "runs/run/metrics.jsonl"
EMPTY: tuple[str, Damage] = ("empty", with_content(b""))
MISSING: tuple[str, Damage] = ("missing", Path.unlink)
FILES: dict[str, list[tuple[str, Damage]]] = {
    LEDGER: [("cut", cut), ("garbage", with_content(b"no ledger \xff" * 500)), EMPTY, MISSING],
    ABOUT: [("cut", cut), ("without config", with_content(b"{}")), EMPTY, MISSING],
    "runs/other/run.json": [("cut", cut), EMPTY, ("without config", with_content(b"{}"))],
    ROWS: [
        ("bad UTF-8", appended(b"\xff\xfe")),
        ("a number", appended(b"12")),
        ("null", appended(b"null")),
        ("{}", appended(b"{}")),
        ("a row without scores", appended(TAIL)),
        ("a round that is text", appended(b'{"kind": "round", "round": "2", "test": 1}')),
        ("a request without clients", appended(b'{"kind": "forget", "round": 2, "request": "r1"}')),
        ("cut", cut),
        EMPTY,
        MISSING,
    ],
    "heads/run.json": [("cut", cut), ("garbage", with_content(b"\xff")), MISSING],
    "keys/*": [("cut", cut), MISSING],
    "runs/run/checkpoints/*": [("cut", cut), EMPTY, MISSING],
    "runs/run/receipts/r1.json": [("cut", cut), MISSING],
}  # fmt: skip
SPACE = (0, 4, 40, 400, 1200, 2000)  # KiB that are left


def main() -> None:
    """Print one table, a row for each damage."""
    p = argparse.ArgumentParser("python -m benchmarks.reliability.storage", description=__doc__)
    p.add_argument("--only", default="", help="damages whose names have this regular expression")
    options = p.parse_args()
    torch.set_num_threads(1)
    draw_nothing()
    timing.table("what commands do", ("damage", *COMMANDS, "afterwards"), rows(options.only), width=160)


def rows(only: str = "") -> list[list[str]]:
    """Try damages with every command; gives a row for each."""
    with tempfile.TemporaryDirectory(prefix="storage-") as folder:
        base, home = Path(folder) / "base", Path(folder) / "home"
        for name in ("other", "run"):
            words = f"run digits {SMALL} rounds=2 forget.schedule={{1:[2]}} strategy=leave run={name} {HERE}"
            command(words, base)
        home.mkdir()
        return [row(what, base, home, harm) for what, harm in harms(home).items() if re.search(only, what)]


def harms(home: Path) -> dict[str, Harm]:
    """Give everything that may be wrong with a state folder, by what it is called."""
    found: dict[str, Harm] = {
        f"{place}: {name}": partial(damaged, home, place, damage)
        for place, damages in FILES.items()
        for name, damage in damages
    }
    found |= {f"disk with {space} KiB left": partial(filled, home, space) for space in SPACE}
    found |= {"read-only folder": partial(read_only, home), "locked ledger": partial(locked, home)}
    return found | {
        f"no flock: {errno.errorcode[no]}": partial(without_flock, no) for no in (errno.ENOLCK, errno.ENOTSUP)
    }


def row(what: str, base: Path, home: Path, harm: Harm) -> list[str]:
    """Give every command under one damage; says what each did, and whether all is well afterwards."""
    cells, wrong = [], []
    for words in COMMANDS.values():
        with tmpfs(home):
            shutil.copytree(base, home, dirs_exist_ok=True)
            with harm():
                status, said = answer(words, home)
            cells.append(verdict(status, said))
            wrong += after(home)
            if cells[-1] not in ("1 line", "done"):
                print(f"{what}, {words}: {status} {said[-600:]}", flush=True)
    print(what, *cells, sorted(set(wrong)), sep=" | ", flush=True)
    return [what, *cells, "; ".join(sorted(set(wrong))) or "sound"]


def answer(words: str, home: Path) -> tuple[str, str]:
    """Give a command in a process of its own; returns its status and what it said."""
    status, log = home.with_suffix(".status"), home.with_suffix(".log")
    status.unlink(missing_ok=True)
    log.write_text("")
    forked(lambda: status.write_text(str(command(words, home))))
    return (status.read_text() if status.exists() else "traceback"), log.read_text()


def verdict(status: str, said: str) -> str:
    """Judge what a command said."""
    errors = [line for line in said.splitlines() if line.startswith(("error: ", "wrong: "))]
    if status == "traceback" or "Traceback" in said:
        return "TRACEBACK"
    if status == "0":
        return "done"
    return "1 line" if errors and all(re.search(r"/|\.json|run other", line) for line in errors) else "NO LINE"


def after(home: Path) -> list[str]:
    """Say what is wrong with the run once the damage is undone."""
    try:
        run = Run.opened(home / "runs" / "run")
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:90]}"]
    try:
        current = run.ledger.current()
        return [*problems(run), *([] if current and current.round >= 2 else ["the model is older"])]
    finally:
        run.ledger.close()


@contextmanager
def damaged(home: Path, place: str, damage: Damage) -> Iterator[None]:
    """Damage files, and put back those that nobody has written anew; a ledger in any case."""
    before = {file: file.read_bytes() for file in home.glob(place)}
    for file in before:
        damage(file)
    harmed = {file: file.read_bytes() if file.exists() else None for file in before}
    yield
    for file, content in before.items():
        if file.suffix == ".sqlite" or (file.read_bytes() if file.exists() else None) == harmed[file]:
            file.write_bytes(content)


@contextmanager
def filled(home: Path, space: int) -> Iterator[None]:
    """Leave so many KiB of the disk."""
    disk = os.statvfs(home)
    rest = disk.f_bavail * disk.f_frsize - 1024 * space
    (home / "ballast").write_bytes(bytes(rest))
    yield
    (home / "ballast").unlink()


@contextmanager
def read_only(home: Path) -> Iterator[None]:
    """Let nobody write to the disk."""
    subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", home], check=True)


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Have another connection hold the ledger; it is waited for two seconds instead of 60."""
    seconds = database.LOCKED_SECONDS, database.TRY_SECONDS
    database.LOCKED_SECONDS, database.TRY_SECONDS = 2, 1
    other = sqlite3.connect(home / LEDGER)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.close()
    database.LOCKED_SECONDS, database.TRY_SECONDS = seconds


@contextmanager
def without_flock(number: int) -> Iterator[None]:
    """Be on a file system that cannot lock files."""

    def refuse(*about: object) -> None:
        raise OSError(number, os.strerror(number))

    flock, fcntl.flock = fcntl.flock, refuse  # type: ignore[assignment]
    yield
    fcntl.flock = flock


@contextmanager
def tmpfs(folder: Path) -> Iterator[None]:
    """Mount a small disk."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


if __name__ == "__main__":
    main()
