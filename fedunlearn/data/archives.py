"""Unpack archives of images, and find the folder in them that the images are in."""

import errno
import logging
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from fedunlearn.data.dicom import OF_PILLOW
from fedunlearn.data.images import OF_SYSTEMS
from fedunlearn.errors import UserError, printable

UTF_8 = 0x800
"""The flag of a name in a zip archive that is UTF-8 for certain."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the disk that is unpacked to, and not of an archive."""
FAT, UNIX = 0, 3
"""What a zip archive says of the system that it was made on."""

log = logging.getLogger("fedunlearn")


class _Member(NamedTuple):
    """A file in an archive.

    Attributes:
        name: its path in the archive.
        time: of its last change, in seconds since 1970.
        opened: gives its content; None for what is no file: a symbolic link, a device.
    """

    name: str
    time: float
    opened: Callable[[], IO[bytes]] | None


def extract(archive: Path, folder: Path) -> None:
    """Unpack the files of a zip or tar archive, compressed in any way, into a folder.

    Nothing but files is made: symbolic links and devices are passed over, and a hard link becomes a file of its own.

    Args:
        archive: a file; what it is, its content says.
        folder: that exists.

    Raises:
        UserError: it is no archive, it is damaged or encrypted, or it has a file that would lie outside the folder.
    """
    where = printable(str(archive))
    passed_over = 0
    try:
        for name, time, opened in _members(archive):
            target = _target(folder, name)
            if target is None:
                raise UserError(f"{where} is refused: {printable(name)} would lie outside its folder")
            if opened is None:
                passed_over += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
            with suppress(OSError, OverflowError, ValueError):  # a time that no file can have
                os.utime(target, (time, time))
    except UserError:
        raise
    except Exception as error:  # each archive format has errors of its own
        if getattr(error, "errno", None) in FULL:
            raise
        reason = printable(str(error) or type(error).__name__)
        raise UserError(f"data.root={where} is no folder and no readable archive ({reason})") from error
    if passed_over:
        log.info("passed over in %s: %d links and devices", where, passed_over)


def _members(archive: Path) -> Iterator[_Member]:
    """Give all that is in an archive, but for folders."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            yield from (_of_zip(content, entry) for entry in content.infolist() if not _is_folder(entry))
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as content:
            yield from (_of_tar(content, entry) for entry in content if not entry.isdir())
    else:
        raise ValueError("it is neither zip nor tar")


def _of_zip(content: zipfile.ZipFile, entry: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == UNIX else 0
    opened = partial(content.open, entry) if kind in (0, stat.S_IFREG) else None
    return _Member(_name_of(entry), _seconds(entry.date_time), opened)


def _seconds(date_time: Sequence[int]) -> float:
    """Give seconds since 1970; 0 for a date that there is not, as some programs write it."""
    try:
        return datetime(*date_time[:6], tzinfo=UTC).timestamp()
    except ValueError:
        return 0.0


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    return entry.is_dir() or _name_of(entry).endswith("/")


def _of_tar(content: tarfile.TarFile, entry: tarfile.TarInfo) -> _Member:
    def opened() -> IO[bytes]:
        file = content.extractfile(entry)  # of a hard link, the file that it is of
        if file is None:
            raise ValueError(f"{entry.name} is a link to what is no file")
        return file

    return _Member(entry.name, entry.mtime, opened if entry.isreg() or entry.islnk() else None)


def _target(folder: Path, name: str) -> Path | None:
    """Give the place of a file in a folder; None where its path would lead out of it, or to the folder itself."""
    parts = PurePosixPath(name).parts
    is_relative = not name.startswith("/") and not Path(name).drive
    return folder.joinpath(*parts) if parts and is_relative and ".." not in parts else None


def _name_of(entry: zipfile.ZipInfo) -> str:
    """Give the name of an entry: many programs write UTF-8 without saying so, which reads as a code page of 1981."""
    name = entry.filename
    if not entry.flag_bits & UTF_8:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:  # it is of that code page
            name = entry.filename
    if entry.create_system == FAT:
        name = name.replace("\\", "/")
        return f"/{name}" if name[1:2] == ":" else name  # with a drive it is absolute
    return name


def entered(folder: Path, beside: str = "") -> Path:
    """Enter the one folder that is around everything else, if there is one, and the one in that.

    Hidden entries, those of operating systems and single files such as a README are not counted. A folder that holds
    images is never left out, nor is one of a single class.

    Args:
        folder: to begin with.
        beside: a file that the folder sought has in it, where there is one; relative.
    """
    while not (beside and (folder / beside).is_file()):
        folders = _folders(folder)
        if len(folders) != 1 or _has_images(folder) or not _folders(folders[0]):
            break
        folder = folders[0]
    return folder


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if _is_shown(entry.name) and entry.is_dir()]


def _has_images(folder: Path) -> bool:
    return any(_is_shown(name) and name.lower().endswith(OF_PILLOW) for name in os.listdir(folder))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name not in OF_SYSTEMS
