"""Archives that are unpacked in the state folder, and files of them that stay away because nobody needs them any more.

Beside each folder of an unpacked archive a file of JSON says which archive it is, which files were deleted, and which
ones no longer matter to a decoded copy.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedunlearn.data.removal import remove_folder

PREFIX = "unpacked-"
"""How the names of such folders begin."""


def note_archive(folder: Path, archive: Path) -> None:
    """Write down which archive a folder is of, where nobody has yet."""
    if not _beside(folder).exists():
        _write(folder, {"archive": str(archive), "deleted": [], "unneeded": {}})


def delete_again(folder: Path, fresh: Path) -> None:
    """Delete files from a fresh copy that were deleted from the folder which it takes the place of."""
    for name in _about(folder)["deleted"]:
        (fresh / name).unlink(missing_ok=True)


def at_source(file: str) -> str:
    """Name a file as somebody finds it at the source: one of an archive by the archive and its place in there."""
    folder = _folder_of(Path(file))
    return f"{_about(folder)['archive']}: {Path(file).relative_to(folder).as_posix()}" if folder else file


def is_at_source(name: str) -> bool:
    """Say whether a file that `at_source` has named is there still, as far as one can see without reading archives."""
    beginnings = (name[:end] for end in range(len(name)) if name.startswith(": ", end))
    return os.path.lexists(name) or any(map(os.path.isfile, beginnings))


def note_unneeded(store: Path, files: Iterable[str]) -> None:
    """Write down that a decoded copy has no need of some files any more, those of archives."""
    for folder, names in _by_folder(map(Path, files)):
        about = _about(folder)
        about["unneeded"][store.name] = sorted({*about["unneeded"].get(store.name, ()), *names})
        _write(folder, about)


def note_needed(store: Path, files: Iterable[str]) -> None:
    """Take back for some files what `note_unneeded` has written down."""
    for folder, names in _by_folder(map(Path, files)):
        about = _about(folder)
        about["unneeded"][store.name] = sorted({*about["unneeded"].get(store.name, ())} - {*names})
        _write(folder, about)


def delete_unneeded(folder: Path, stores: Collection[Path]) -> int:
    """Delete the files of an unpacked archive that none of some decoded copies needs; gives how many were there."""
    about = _about(folder)
    unneeded = [{*about["unneeded"].get(store.name, ())} for store in stores]
    return delete(folder / name for name in set.intersection(*unneeded)) if unneeded else 0


def delete(files: Iterable[Path]) -> int:
    """Delete files of unpacked archives, for good; gives how many were there. Other files stay."""
    count = 0
    for folder, names in _by_folder(files):
        about = _about(folder)
        _write(folder, about | {"deleted": sorted({*about["deleted"], *names})})
        for name in names:
            count += (folder / name).exists()
            (folder / name).unlink(missing_ok=True)
    return count


def is_whole(folder: Path) -> bool:
    """Say whether no file of an unpacked archive was deleted."""
    return not _about(folder)["deleted"]


def forget_deletions(folder: Path) -> None:
    """Delete an unpacked archive, which is unpacked again with all its files."""
    _write(folder, _about(folder) | {"deleted": []})
    if folder.exists():
        remove_folder(folder)


def remove(folder: Path) -> None:
    """Delete an unpacked archive, and what is known of it."""
    remove_folder(folder)
    _beside(folder).unlink(missing_ok=True)


def _folder_of(file: Path) -> Path | None:
    """The folder of the unpacked archive that a file is in, if it is in one."""
    return next((one for one in file.parents if one.name.startswith(PREFIX) and _beside(one).exists()), None)


def _by_folder(files: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    found: dict[Path, list[str]] = {}
    for file in files:
        if folder := _folder_of(file):
            found.setdefault(folder, []).append(file.relative_to(folder).as_posix())
    yield from found.items()


def _beside(folder: Path) -> Path:
    """The file about a folder; whoever deletes the folder by hand and what else is called so does not delete it."""
    return folder.with_name(f"archive-{folder.name.removeprefix(PREFIX)}.json")


def _about(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_beside(folder).read_text())
        return {"archive": str(found["archive"]), "deleted": [*found["deleted"]], "unneeded": {**found["unneeded"]}}
    except (OSError, ValueError, KeyError, TypeError):  # it was lost: then nothing is known
        return {"archive": "", "deleted": [], "unneeded": {}}


def _write(folder: Path, about: dict[str, Any]) -> None:
    new = _beside(folder).with_name(f".{folder.name}.{os.getpid()}")
    new.write_text(json.dumps(about))
    os.replace(new, _beside(folder))
