"""Looks for what is left of clients, by content: their images, their labels, the files that these were read from."""

import os
import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedunlearn.build import fingerprint_of, owners_of, slices_of, source_of, unpacked_of
from fedunlearn.data.images import image_paths
from fedunlearn.data.search import Found, Wanted
from fedunlearn.data.store import Belongings, Dataset
from fedunlearn.data.unpacked import is_whole
from fedunlearn.errors import UserError
from fedunlearn.runs.run import Run

log = getLogger("fedunlearn")


class Owned(NamedTuple):
    """Some clients' images, and what there is to tell them from.

    Attributes:
        images: theirs and all others.
        class_counts: of each of the clients' training images, [K], by its number as text.
    """

    images: Belongings
    class_counts: dict[str, list[int]]


@contextmanager
def owned_by(run: Run, clients: Collection[int]) -> Iterator[Owned]:
    """Give the clients' images, from the decoded copy or else from their source; files of an archive for the while.

    Raises:
        UserError: neither has them as the run was trained on them.
    """
    config, about = run.config_here(), run.about()
    if config.partition.is_on_nodes:
        raise UserError(
            f"the images of {run.named(clients)} are on a machine of their own: nobody else can look for them"
        )
    if not all(about["data"][str(client)] for client in clients):
        raise UserError(f"run {run.name} began without images of {run.named(clients)}: there are none to look for")
    source = source_of(config)
    with ExitStack() as stack:
        for dataset in _copies(run, stack):
            slices = slices_of(config, dataset)
            if all(fingerprint_of(dataset, slices, client) == about["data"][str(client)] for client in clients):
                kinds = len(about["images"]["class_names"])
                each = {str(c): np.bincount(dataset.train.labels[slices[c]], minlength=kinds) for c in clients}
                counts = {client: own.tolist() for client, own in each.items()}
                names = owners_of(config, dataset)
                owners = [names[client] for client in clients] if names else []
                yield Owned(dataset.belongings(clients, slices, owners), counts)
                return
    raise UserError(
        f"the images of {run.named(clients)} can be looked for no more: neither the decoded copy "
        f"({source.store}) nor its source has them as run {run.name} was trained on them"
    )


def _copies(run: Run, stack: ExitStack) -> Iterator[Dataset]:
    """Every place that a run's images can be taken from; what is unpacked for that is deleted with the stack."""
    config = run.config_here()
    source = source_of(config)
    if source.store.is_dir():
        try:
            copy = source.opened()
            _ = copy.train, copy.test, copy.files, copy.owners, copy.test_owners
        except UserError as error:
            log.warning("the source has to do: %s", error)
        else:
            yield copy
    archive = unpacked_of(config)
    if archive is None or is_whole(archive):
        yield source.in_memory()
    else:
        elsewhere = stack.enter_context(tempfile.TemporaryDirectory())
        yield source_of(config.model_copy(update={"home": elsewhere})).in_memory()


def wanted(owned: Owned) -> Wanted:
    """Prepare to look for the clients' images, for their labels, and for the files that they are from."""
    images, labels, others, listed, source = owned.images
    files = [file for file in listed if file.exists()]
    theirs = {*map(str, files)}
    other_files = (Path(file) for file in image_paths(source) if file not in theirs) if files else ()
    return Wanted(images, *labels, others=others, files=files, other_files=other_files)


def scan(look_for: Wanted, roots: Iterable[Path]) -> Iterator[tuple[Path, Found]]:
    """Search all files below some folders; gives those in which something is, or that could not all be read."""
    for path in files_below(roots):
        try:
            found = look_for.found_in(path)
        except FileNotFoundError:  # it was deleted meanwhile
            continue
        except OSError as error:
            found = Found(unread=error.strerror or str(error))
        if found:
            yield path, found


def files_below(roots: Iterable[Path]) -> list[Path]:
    """List all plain files below some folders, each once; links are followed after everything else.

    So a file has the name by which it is reached without links, if there is one.
    """
    found: dict[Path, Path] = {}
    folders: set[Path] = set()
    waiting = deque(roots)
    while waiting:
        path = waiting.popleft()
        try:
            if path.is_file():
                found.setdefault(path.resolve(), path)
            elif path.is_dir() and path.resolve() not in folders:
                folders.add(path.resolve())
                inside = sorted(path.iterdir())
                waiting.extendleft(one for one in reversed(inside) if not one.is_symlink())
                waiting.extend(one for one in inside if one.is_symlink())
        except OSError:  # whoever reads it says so
            found.setdefault(path, path)
    return list(found.values())


def existing(paths: Iterable[Path]) -> list[Path]:
    """Give the files and folders that somebody named.

    Raises:
        UserError: one of them does not exist.
    """
    named = list(paths)
    for path in named:
        if not os.path.exists(path):
            raise UserError(f"--also {path}: there is no such file or folder")
    return named


def default_places(home: Path) -> list[Path]:
    """List the folders in which copies may lie: the state folder, Ray's sessions, and Flower's databases."""
    return [home, ray_folder(), flower_folder()]


def ray_folder() -> Path:
    """Say where Ray keeps its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def flower_folder() -> Path:
    """Say where Flower keeps its files."""
    return Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser()


def why_left(path: Path, found: Found, home: Path) -> str:
    """Say whose a file is, how nothing is left in it, and why it could not all be searched."""
    unread = f"it cannot be read to the end ({found.unread}), " if found.unread else ""
    return unread + way_out(path, home)


def way_out(path: Path, home: Path) -> str:
    """Say whose a file is, and how nothing is left in it."""
    if path.is_relative_to(ray_folder()):
        return "Ray's: end Ray and delete its session folder"
    if path.is_relative_to(flower_folder()) or path.name.startswith("superlink"):
        return "Flower's: start flower-superlink without --database, or delete the file when it has ended"
    if path.is_relative_to(home / "data"):
        return _way_out_of_data(path.relative_to(home / "data").parts)
    if path.is_relative_to(home):
        return "this program's: remove the folder of the run or study"
    return "somebody else's"


def _way_out_of_data(parts: tuple[str, ...]) -> str:
    if len(parts) == 1:
        return "somebody put it there: delete it, or move it away"
    if parts[0].startswith(("cifar", "unpacked-")):
        return "a download or an unpacked archive, which all images come from: delete the folder"
    return "the decoded copy: `fedunlearn purge`; it says which run still needs them"


def not_told_apart(look_for: Wanted) -> list[str]:
    """Say how many images, and how many source files, have nothing of their own to be found by."""
    counts = {"images": look_for.unknown, "source files": look_for.unknown_files}
    return [f"{count} of the {what} cannot be told from others" for what, count in counts.items() if count]


def in_words(found: Found) -> str:
    """Say what was found.

    Example:
        >>> in_words(Found(images={1, 2}, labels=True))
        '2 images, all labels'
        >>> in_words(Found(unread="Error -3 while decompressing"))
        'perhaps images'
    """
    counts = {"images": len(found.images), "source files": len(found.files)}
    words = [f"{count} {what[:-1] if count == 1 else what}" for what, count in counts.items() if count]
    words += ["all labels"] if found.labels else []
    words += [f"perhaps {'more ' if words else ''}images"] if found.unread else []
    return ", ".join(words)
