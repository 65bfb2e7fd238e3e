"""Unpack archives of images, and find the folder in them that the images are in."""

import errno
import os
import shutil
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from fedunlearn.data.dicom import OF_PILLOW
from fedunlearn.data.images import OF_SYSTEMS
from fedunlearn.errors import UserError, printable

UTF_8 = 0x800
"""The flag of a name in a zip archive that is UTF-8 for certain."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the disk that is unpacked to, and not of an archive."""
FAT = 0
"""What an archive says of itself that was made on Windows."""


def extract(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar archive, compressed in any way, into a folder.

    Args:
        archive: a file; what it is, its content says.
        folder: that exists.

    Raises:
        UserError: it is no archive, it is damaged or encrypted, or it has a file that would lie outside the folder.
    """
    try:
        if zipfile.is_zipfile(archive):
            _extract_zip(archive, folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as content:
                content.extractall(folder, filter="data")
        else:
            raise ValueError("it is neither zip nor tar")
    except tarfile.FilterError as error:
        raise UserError(f"{printable(str(archive))} is refused: {printable(str(error))}") from error
    except UserError:
        raise
    except Exception as error:  # each archive format has errors of its own
        if getattr(error, "errno", None) in FULL:
            raise
        where = printable(str(archive))
        raise UserError(f"data.root={where} is no folder and no readable archive ({printable(str(error))})") from error


def _extract_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        for entry in content.infolist():
            name = _name_of(entry)
            parts = PurePosixPath(name).parts
            if ".." in parts or name.startswith("/") or (entry.create_system == FAT and name[1:2] == ":"):
                raise UserError(f"{printable(str(archive))} is refused: {printable(name)} would lie outside its folder")
            if entry.is_dir() or name.endswith("/") or not parts:
                continue
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with content.open(entry) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file)


def _name_of(entry: zipfile.ZipInfo) -> str:
    """Give the name of an entry: many programs write UTF-8 without saying so, which reads as a code page of 1981."""
    name = entry.filename
    if not entry.flag_bits & UTF_8:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:  # it is of that code page
            name = entry.filename
    return name.replace("\\", "/") if entry.create_system == FAT else name


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
