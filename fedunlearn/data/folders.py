"""Images whose owners are known: a tree with a folder for each client, or a table of paths and clients."""

import difflib
import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fedunlearn.data.images import OF_SYSTEMS, class_name, find_images
from fedunlearn.data.separated import NoTableError, read_rows
from fedunlearn.errors import UserError, printable

VALIDATION = frozenset(("val", "valid", "validation", "dev", "eval"))
"""Names of folders of images for validation."""

SPLITS = frozenset(("train", "training", "test", "testing", *VALIDATION))
"""Names of folders that say what images are for, and not what is on them."""

COLUMNS = ("path", "client", "class", "split", "patient")
"""Of a table of owners; the first two are needed."""

HELD_OUT_EVERY = 6
"""Of a client's images of a class, one of so many is held out, where nobody says which are."""

LISTED = 10
"""Mistakes of a table that an error names."""

KINDS = ("folders", "file", "nodes")
"""Partitions in which somebody says who owns an image."""


log = logging.getLogger("fedunlearn")


class Listed(NamedTuple):
    """An image file and what is known of it.

    Attributes:
        file: its path, relative to the source.
        label: name of its class.
        is_test: whether it is held out.
        patient: whose it is, where that is known.
    """

    file: str
    label: str
    is_test: bool = False
    patient: str = ""


class Owned(NamedTuple):
    """The image files of a source by their owners.

    Attributes:
        root: the folder that they lie in.
        images: by the client's name, in the order of names; a client may have none.
        common: held-out images that are no client's.
        passed_over: how many files of the folder were not taken, by kind.
    """

    root: Path
    images: dict[str, list[Listed]]
    common: list[Listed]
    passed_over: Mapping[str, int]


def owned(root: Path, kind: str, file: str = "", here: Sequence[str] = (), removed: Collection[str] = ()) -> Owned:
    """List the images of a source with their owners.

    Args:
        root: the folder.
        kind: one of `KINDS`: `folders` for `of_folders`, `file` for `of_table`, `nodes` for `of_machine`.
        file: the table, relative to the folder or absolute.
        here: the clients whose images are on this machine.
        removed: clients whose files a table may still name when they are gone.

    Raises:
        UserError: nobody can say whose the images are.
    """
    if kind == "nodes":
        return of_machine(root, here)
    return of_folders(root) if kind == "folders" else of_table(root, root / Path(file).expanduser(), removed)


def hidden(name: str) -> str:
    """Give a digest of a client's name, by which only who knows the name knows it again.

    Example:
        >>> hidden("hospital_b")
        'sha256:2cad6aa161444a47'
    """
    return f"sha256:{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def revealed(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Give names for digests of known names; all others stay as they are."""
    by_digest = {hidden(name): name for name in known}
    return [by_digest.get(name, name) for name in names]


def of_folders(root: Path) -> Owned:
    """List the images of a tree root/client/class/image.

    With root/train/client/class/image there may be root/test/class/image, which are nobody's, and
    root/test/client/class/image. Without a folder `test` one for validation is taken, which is left out else. Without
    either, every sixth image of a client and class is held out.

    Args:
        root: the folder.

    Raises:
        UserError: the tree is of another form.
    """
    found = find_images(root)
    is_split = (root / "train").is_dir()
    base = root / "train" if is_split else root
    held_out = _held_out_folder(root) if is_split else ""
    _check_form(root, base)
    clients: dict[str, list[Listed]] = {class_name(name): [] for name in subfolders(base)}
    by_class: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    common: list[Listed] = []
    for file in found.files:
        split, *parts = file.parts if is_split else ("train", *file.parts)
        if is_split and split.casefold() in VALIDATION and split != held_out:
            continue
        names = [class_name(part) for part in parts[:-1]]
        is_test = split == held_out
        if is_test and len(names) == 1:
            common.append(Listed(str(file), names[0], is_test=True))
            continue
        if len(names) < 2:
            raise UserError(
                f"{_shown(root / file)} has no folder of a client and a class: partition.kind=folders reads "
                "root/client/class/image (without owners root/class/image, and partition.kind=dirichlet)"
            )
        by_class[names[0], names[1]].append(Listed(str(file), names[1], is_test))
    if not held_out:
        by_class = {owner: _held_out(images) for owner, images in by_class.items()}
    for (client, _), images in sorted(by_class.items()):
        if client not in clients:
            raise UserError(f"{_shown(root / images[0].file)}: there is no client {client} in {_shown(base)}")
        clients[client].extend(images)
    return Owned(root, dict(sorted(clients.items())), common, found.passed_over)


def of_machine(root: Path, here: Sequence[str] = ()) -> Owned:
    """List the images of one machine: those of the clients that are here, or without any the server's held-out ones.

    A client's folder is CLASS/image, or train/CLASS/image beside test/, which is left alone. One client has the root
    itself as its folder; of several each has one of its name in it. The server's is CLASS/image or test/CLASS/image.

    Args:
        root: the folder.
        here: the clients' names.

    Raises:
        UserError: a folder is missing, has no images, or is of another form.
    """
    if not here:
        files, passed_over = _of_split(root, root, "test")
        return Owned(root, {}, [image._replace(is_test=True) for image in files], passed_over)
    images, passed_over = {}, Counter()
    for name in sorted(here):
        images[name], others = _of_split(root, root / name if len(here) > 1 else root, "train")
        passed_over.update(others)
    return Owned(root, images, [], passed_over)


def _of_split(root: Path, folder: Path, split: str) -> tuple[list[Listed], Mapping[str, int]]:
    """List the images of folder/CLASS, or of folder/split/CLASS where there is such a split, and what was not taken."""
    base = folder / split if (folder / split).is_dir() else folder
    if not base.is_dir():
        raise UserError(f"{_shown(base)} is missing: with several clients each has its own folder in {_shown(root)}")
    check_classes(base)
    found = find_images(base)
    images = [
        Listed(str((base / file).relative_to(root)), class_name(file.parts[0]))
        for file in found.files
        if len(file.parts) > 1
    ]
    if not images:
        raise UserError(f"{_shown(base)} has no images: CLASS/image is read, or {split}/CLASS/image")
    return sorted(images, key=lambda image: (image.label, image.file)), found.passed_over


def _held_out_folder(root: Path) -> str:
    """Name the folder of held-out images beside train/, if there is one; say where validation images are left out."""
    validation = [name for name in subfolders(root) if name.casefold() in VALIDATION]
    if (root / "test").is_dir():
        if validation:
            log.info("left out of %s: %s", _shown(root), _listed(validation))
        return "test"
    return validation[0] if validation else ""


def _check_form(root: Path, base: Path) -> None:
    """Raise UserError where folders are named like splits, or a class folder holds only folders."""
    others = sorted(name for name in set(subfolders(root)) - {"train", "test"} if name.casefold() not in VALIDATION)
    if base != root and others:
        raise UserError(
            f"{_shown(root)} has {_listed(others)} beside train/ and test/: move it away, or into one of them"
        )
    named_like_splits(base, "root/client/class/image, or root/train/client/class/image and root/test/class/image")
    if base == root and (alike := [name for name in subfolders(root) if name.casefold() in SPLITS]):
        raise UserError(
            f"{_shown(root)} has {_listed(alike)} beside folders of clients: give root/train/client/class/image and "
            "root/test/class/image, or partition.file=clients.csv"
        )
    for client in subfolders(base):
        named_like_splits(
            base / client,
            "root/train/client/class/image and root/test/client/class/image, or partition.file=clients.csv",
        )
        for name in subfolders(base / client):
            if only_folders(base / client / name):
                raise UserError(
                    f"{_shown(base / client / name)} is the folder of a class and holds only folders: "
                    "partition.kind=folders reads root/client/class/image (who has patients' folders names them in "
                    "partition.file=clients.csv)"
                )


def check_classes(root: Path) -> None:
    """Raise UserError where the class folders of a tree without owners are clients or splits."""
    named_like_splits(root, "train/ and test/")
    for name in subfolders(root):
        if only_folders(root / name):
            raise UserError(
                f"{_shown(root / name)} is the folder of a class and holds only folders: are these the classes of a "
                "client (partition.kind=folders)?"
            )


def named_like_splits(folder: Path, forms: str) -> None:
    """Raise UserError where two subfolders or more are named like splits; `forms` says how they may be named."""
    names = subfolders(folder)
    if len(alike := [name for name in names if name.casefold() in SPLITS]) > 1:
        raise UserError(
            f"{_shown(folder)} has {_listed(alike)}, which are no classes and no clients: {forms} is read. Is there a "
            "folder for each client (partition.kind=folders)?"
        )


def only_folders(folder: Path) -> bool:
    """Say whether there are folders in a folder, and no files."""
    with os.scandir(folder) as entries:
        visible = (e for e in entries if not e.name.startswith(".") and e.name not in OF_SYSTEMS)
        first = next(visible, None)
        return first is not None and first.is_dir() and all(entry.is_dir() for entry in visible)


def subfolders(folder: Path) -> list[str]:
    """Name the folders in a folder, but for hidden ones and those of operating systems."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(name for name in names if name not in OF_SYSTEMS)


def _held_out(images: Sequence[Listed]) -> list[Listed]:
    """Hold every sixth of some images out."""
    last = HELD_OUT_EVERY - 1
    return [image._replace(is_test=place % HELD_OUT_EVERY == last) for place, image in enumerate(images)]


def _held_out_patients(images: Iterable[Listed]) -> list[Listed]:
    """Hold about one in six patients out with all images. One without a patient counts as of a patient of its own.

    The name alone decides. So a patient is held out at all clients or at none, and nobody moves where others go.
    """
    return [image._replace(is_test=_is_one_in_six(image.patient or class_name(image.file))) for image in images]


def _is_one_in_six(name: str) -> bool:
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT_EVERY == 0


def of_table(root: Path, table: Path, removed: Collection[str] = ()) -> Owned:
    """List the images that a table of paths and clients names.

    Its columns are `path` (relative to the folder) and `client`, and if they are there `class` (else the name of the
    folder that an image is in), `patient`, and `split` (`train` or `test`). Without `split` about one in six patients
    is held out, or without patients every sixth of a client and class.
    A held-out image without a client is nobody's. Images that have no row are passed over.

    Args:
        root: the folder that paths are relative to.
        table: a CSV file, in UTF-8, with commas, semicolons or tabs.
        removed: clients whose images were removed: a line of theirs whose file is gone is passed over.

    Raises:
        UserError: the table cannot be read, or names of columns, paths or splits are wrong: all of them in one list.
    """
    found = find_images(root)
    known = {class_name(str(file)): str(file) for file in found.files}
    rows = list(_rows(table))
    columns = rows[0][1] if rows else {}
    hold_out = list if "split" in columns else _held_out_patients if "patient" in columns else _held_out
    by_class: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    common, wrong, seen = [], [], Counter()
    for number, row in rows:
        path = _relative(root, row["path"], known)
        seen[path] += 1
        if row["client"] in removed and path not in known:
            continue
        if mistake := _mistake(root, path, row, known, seen[path]):
            wrong.append(f"line {number}: {mistake}")
            continue
        label = row.get("class") or class_name(PurePosixPath(path).parent.name)
        image = Listed(known[path], label, row.get("split", "").casefold() == "test", row.get("patient", ""))
        (by_class[row["client"], label] if row["client"] else common).append(image)
    if wrong:
        more = f"\n  and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        lines = "".join(f"\n  {printable(line)}" for line in wrong[:LISTED])
        raise UserError(f"partition.file={_shown(table)} has {len(wrong)} wrong lines:{lines}{more}")
    images: dict[str, list[Listed]] = {client: [] for _, row in rows if (client := row["client"])}
    for (client, _), own in sorted(by_class.items()):
        images[client].extend(hold_out(sorted(own)))
    without = len(known.keys() - seen.keys())
    passed_over = {**found.passed_over, **({"image without a line in the table": without} if without else {})}
    return Owned(root, dict(sorted(images.items())), sorted(common), passed_over)


def _relative(root: Path, text: str, known: Mapping[str, str]) -> str:
    """Give a path of a table relative to the folder, with slashes as they are here."""
    path = os.path.normpath(_below(root, text) if os.path.isabs(text) else text)
    slashed = os.path.normpath(text.replace("\\", "/"))
    return class_name(slashed if class_name(path) not in known else path)


def _below(root: Path, text: str) -> str:
    """Give an absolute path relative to the folder, of which either may be written through a link."""
    path = os.path.relpath(text, root)
    if not path.startswith(".."):
        return path
    folder, name = os.path.split(text)
    return os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(root))


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Give the lines of a table with their numbers; every value is without blanks around it."""
    try:
        rows = read_rows(table)
    except (OSError, NoTableError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"partition.file={_shown(table)} cannot be read: {reason}") from error
    names = rows[0][1] if rows else []
    _check_columns(table, names)
    for number, row in rows[1:]:
        yield number, dict(zip_longest(names, row[: len(names)], fillvalue="")) | _beyond(row, names)


def _beyond(row: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    return {"": "more"} if any(row[len(names) :]) else {}


def _check_columns(table: Path, names: Sequence[str]) -> None:
    for name in names:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name.casefold(), COLUMNS, 1, 0.5)
            hint = f": did you mean {near[0]}?" if near else f": there are {', '.join(COLUMNS)}"
            raise UserError(f"partition.file={_shown(table)}: {name!r} is no column{hint}")
    if missing := [name for name in COLUMNS[:2] if name not in names]:
        raise UserError(f"partition.file={_shown(table)} has no column {_listed(missing)}: it has {_listed(names)}")
    if len(set(names)) < len(names):
        raise UserError(f"partition.file={_shown(table)} has a column twice: {', '.join(names)}")


def _mistake(root: Path, path: str, row: Mapping[str, str], known: Iterable[str], times: int) -> str:
    """Say what is wrong with a line; nothing where it is right."""
    split = row.get("split", "train").casefold()
    if "" in row:
        return "it has more values than there are columns"
    if times > 1:
        return f"{row['path']} is there twice"
    if path not in known:
        there = "is no image" if (root / path).exists() and not path.startswith("..") else "is not there"
        return f"{row['path']} {there if not path.startswith('..') else 'is outside of data.root'}"
    if split not in ("train", "test"):
        return f"split {row['split']!r} is neither train nor test"
    if not row.get("class") and not PurePosixPath(path).parent.name:
        return f"{row['path']} has no class: give it one in the column class, or put it into a folder"
    if not row["client"] and split == "train":
        return f"{row['path']} has no client"
    return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names)


def _shown(path: Path) -> str:
    return printable(str(path))
