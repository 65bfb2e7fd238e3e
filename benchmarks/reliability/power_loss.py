"""What a kill or a loss of power leaves on disk: the durable steps of this process, and what they have made durable.

After a loss of power, a file has the content of its last fsync. A folder has the names of its last fsync: renames, new
files and unlinks after that are undone. SQLite syncs by itself, out of sight. Its COMMIT is taken to sync the database
and the names of its folder up to then. Only with `synchronous=EXTRA` it syncs the journal's unlink too. With less, the
journal is back after the loss, so that the last transaction is rolled back. That ends with the folder's next fsync.

Everything that was not synced is lost here. A real loss may keep any part of it.
"""

import hashlib
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

WAYS: tuple[str, ...] = ("killed", "power lost", "half a row")
EXTRA = 3
STATEMENTS = ("BEGIN", "INSERT", "COMMIT")


class Durable:
    """What of a folder would be there after a loss of power."""

    def __init__(self, home: Path) -> None:
        self._home, self._aside = home, home.with_suffix(".aside")
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir()
        self._link = os.link
        self._names: dict[str, dict[str, int]] = {}  # of a folder
        self._content: dict[int, bytes] = {}  # of a file
        for folder in [home, *(path for path in home.rglob("*") if path.is_dir())]:
            self.synced(folder)
            for file in folder.iterdir():
                if file.is_file():
                    self.synced(file)

    def synced(self, path: Path) -> None:
        """Take note of an fsync."""
        if path.is_dir():
            self._names[str(path)] = {file.name: file.stat().st_ino for file in path.iterdir()}
            for folder in (inner for inner in path.iterdir() if inner.is_dir()):
                self._names.setdefault(str(folder), {})
            for ledger in path.glob("*.sqlite"):
                self.synced(ledger)
        else:
            self._content[path.stat().st_ino] = path.read_bytes()

    def keep(self, path: Path) -> None:
        """Keep a file's number from being given to another file, when it is about to be unlinked."""
        if path.is_file():
            self._link(path, self._aside / uuid4().hex)

    def digest(self) -> str:
        """Tell states apart."""
        return digest({path: self._content.get(number, b"") for path, number in self._files(self._home)})

    def write_to(self, folder: Path) -> None:
        """Write what would be there to another folder."""
        for path in [self._home, *(Path(name) for name in self._names if self._is_there(Path(name)))]:
            (folder / path.relative_to(self._home)).mkdir(parents=True, exist_ok=True)
        for file, number in self._files(self._home):
            (folder / file.relative_to(self._home)).write_bytes(self._content.get(number, b""))

    def _is_there(self, path: Path) -> bool:
        inside = self._names.get(str(path.parent), {})
        return path == self._home or (path.name in inside and self._is_there(path.parent))

    def _files(self, folder: Path) -> list[tuple[Path, int]]:
        """Give path and number of each file."""
        found: list[tuple[Path, int]] = []
        for name, number in sorted(self._names.get(str(folder), {}).items()):
            if str(folder / name) in self._names:
                found += self._files(folder / name)
            elif not name.endswith("-journal"):
                found.append((folder / name, number))
        return found


class Steps:
    """Kills a process at each durable step of some work, and keeps what is on disk then.

    At a step that finds other files than those before it, this process forks. The fork keeps the files in `states` as
    the kill leaves them, and ends itself with SIGKILL. Of the way in which it is killed, the name of the folder speaks.
    """

    def __init__(self, home: Path, states: Path) -> None:
        self._home, self._states, self._durable = home, states, Durable(home)
        self._count = dict.fromkeys(WAYS, 0)
        self._seen: dict[str, set[str]] = {way: set() for way in WAYS}
        states.mkdir()

    def during(self, work: Callable[[], object]) -> object:
        """Do some work; this process does nothing else afterwards."""
        for name in ("replace", "rename", "unlink", "remove", "rmdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        sync, connect, steps = os.fsync, sqlite3.connect, self

        def fsync(handle: int) -> None:
            path = Path(os.readlink(f"/proc/self/fd/{handle}"))
            steps.at(f"before fsync {steps.name_of(path)}", path)
            sync(handle)
            if path.is_relative_to(steps._home):
                steps._durable.synced(path)
            steps.at(f"after fsync {steps.name_of(path)}", path)

        class Connection(sqlite3.Connection):
            path = Path()

            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                word = statement.split()[0]
                if word not in STATEMENTS:
                    return super().execute(statement, *values)
                steps.at(f"before {word}", self.path)
                is_written = word == "COMMIT" and self.path.with_name(f"{self.path.name}-journal").exists()
                before = self.path.read_bytes() if is_written else b""
                found = super().execute(statement, *values)
                if is_written:
                    steps.committed(self.path, before, super().execute("PRAGMA synchronous").fetchone()[0])
                steps.at(f"after {word}", self.path)
                return found

        def connected(path: Any, **options: Any) -> sqlite3.Connection:
            made = connect(path, factory=Connection, **options)
            made.path = Path(str(path))
            return made

        os.fsync, sqlite3.connect = fsync, connected  # type: ignore[assignment]
        return work()

    def at(self, step: str, path: Path) -> None:
        """Be at a step, before or after something is done with the file at `path`."""
        if not path.is_relative_to(self._home):
            return
        files = [file for file in sorted(self._home.rglob("*")) if file.is_file()]
        there, durable = digest({file: file.read_bytes() for file in files}), self._durable.digest()
        self._kill("killed", step, there, lambda folder: shutil.copytree(self._home, folder))
        self._kill("power lost", step, durable, self._durable.write_to)
        if step == "before fsync metrics.jsonl":
            self._kill("half a row", step, there, lambda folder: self._halved(path, folder))

    def _kill(self, way: str, step: str, state: str, keep: Callable[[Path], object]) -> None:
        self._count[way] += 1
        if state in self._seen[way]:
            return
        self._seen[way].add(state)
        process = os.fork()
        if process == 0:
            keep(self._states / f"{way} {len(self._seen[way]):03d} {step}")
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL

    def counts(self) -> dict[str, int]:
        """Give how many steps there were, by the way of being killed."""
        return dict(self._count)

    def committed(self, ledger: Path, before: bytes, synchronous: int) -> None:
        """Take note of a COMMIT."""
        self._durable.synced(ledger.parent)
        if synchronous < EXTRA:
            self._durable._content[ledger.stat().st_ino] = before

    def name_of(self, path: Path) -> str:
        """Name a file without what is drawn at random."""
        return ".new" if path.name.startswith(".new-") else path.name

    def _watched(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def called(path: Any, *more: Any, dir_fd: int | None = None, **options: Any) -> None:
            given = Path(os.fsdecode(path))
            file = given if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / given
            last = Path(os.fsdecode(more[0])) if more else file
            self.at(f"before {name} {self.name_of(last)}", last)
            if last.is_relative_to(self._home):
                self._durable.keep(last)
            original(path, *more, **({} if dir_fd is None else {"dir_fd": dir_fd}), **options)
            self.at(f"after {name} {self.name_of(last)}", last)

        return called

    def _halved(self, file: Path, folder: Path) -> None:
        shutil.copytree(self._home, folder)
        data = file.read_bytes()
        end = data.rstrip(b"\n").rfind(b"\n") + 1
        os.truncate(folder / file.relative_to(self._home), (end + len(data)) // 2)


def digest(files: dict[Path, bytes]) -> str:
    """Give one hash of files, whatever the random part of their names."""
    total = hashlib.sha256()
    for path, content in files.items():
        name = ".new" if path.name.startswith(".new-") else str(path)
        total.update(f"{name}\n".encode() + hashlib.sha256(content).digest())
    return total.hexdigest()
