"""Files that have their old or their new content after a crash, never a part of it."""

import os
import tempfile
from pathlib import Path

NEW = ".new-"  # how names of files begin that are not written yet


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file: temporary file -> fsync -> rename -> fsync folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=NEW)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
