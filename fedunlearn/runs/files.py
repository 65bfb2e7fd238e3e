"""Files that have their old or their new content after a crash, never a part of it."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEW = ".new-"  # how names of files begin that are not written yet


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: temporary file -> fsync -> rename -> fsync folder."""
    make_folder(path.parent)
    with named_in_errors(path):
        while not _replaced(path, data):
            pass  # a run that starts has taken the temporary file for one that a crash left
        sync(path.parent)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Have an OSError name the file at `path`: where a write fails, as on a full disk, it names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def delete_unfinished(folder: Path, name: str = "") -> None:
    """Delete temporary files in a folder that a crash left: of the file `name` alone, or else of all files below.

    A process that writes such a file meanwhile writes it again.
    """
    of_name = re.compile(rf"{re.escape(f'{NEW}{name}')}-[^.-]*")
    for file in folder.glob(f"{NEW}*") if name else folder.rglob(f"{NEW}*"):
        if not name or of_name.fullmatch(file.name):
            file.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and the folders that it is in, so that a loss of power does not take them back."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(folder: Path) -> None:
    """Make new names in a folder last, and unlinked ones be gone, also after a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaced(path: Path, data: bytes) -> bool:
    """Replace a file; false where somebody has deleted the temporary one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{NEW}{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError:
        return False
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return True


def sha256_of(file: Path) -> str:
    """Hash a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
