"""Decoded images on disk: uint8 arrays that every process memory-maps, and what a store says of itself."""

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from fedunlearn.data.images import image_paths
from fedunlearn.data.removal import GONE
from fedunlearn.data.selection import image_name
from fedunlearn.data.unpacked import at_source, is_at_source, note_needed, note_unneeded
from fedunlearn.errors import UserError

REMOVED_FILES = "files-to-delete.txt"
"""In a store: files of the source that nobody needs any more, one a line."""

UNFINISHED = ".new-"
"""How names of folders begin that are being written."""
REQUIRED = ("class_names", "fingerprint")
"""What every store says of itself."""

log = logging.getLogger("fedunlearn")


class Split(NamedTuple):
    """Pair images with their labels.

    Attributes:
        images: uint8 [N, H, W, channels], or rows of a table, fp32 [N, 1, 1, features].
        labels: int64 [N].
    """

    images: np.ndarray
    labels: np.ndarray


def fingerprint(split: Split) -> str:
    """Give the SHA-256 of images and labels, in their order.

    Example:
        >>> fingerprint(Split(np.zeros((1, 2, 2, 1), np.uint8), np.array([3])))[:8]
        'b8ab49cd'
    """
    images, labels = stored(split.images), np.ascontiguousarray(split.labels, np.int64)
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


def stored(images: np.ndarray) -> np.ndarray:
    """Give images in the type that they are stored in: fp32 for numbers of a table, else uint8."""
    return np.ascontiguousarray(images, np.float32 if images.dtype == np.float32 else np.uint8)


class Dataset:
    """Open a decoded data set, and memory-map each split when it is first asked for.

    Who asks for the test images alone never touches the files of the training images.

    Args:
        store: the folder that `load` wrote.

    Raises:
        UserError: from every method, where a file of it is missing or damaged.

    Attributes:
        store: the same.
        class_names: K names.
        source: the folder that images were read from, where that is one.
        removed: how many training images of forgotten clients were taken out (`without`).

    Example:
        >>> from fedunlearn.data.datasets import load
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     dataset = load("digits", cache=Path(cache))
        ...     dataset.test.images.shape, dataset.channels, len(dataset.class_names)
        ((360, 8, 8, 1), 1, 10)
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        self._meta = about(store)
        self.removed: int = self._meta.get("removed", 0)
        self._train: str = self._meta.get("train", "train")
        self._test: str = self._meta.get("test", "test")
        self._taken_out: list[str] = self._meta.get("taken_out", [])
        self.class_names: list[str] = self._meta["class_names"]
        self.source = Path(self._meta.get("source", store))

    @classmethod
    def in_memory(cls, decoded: "Decoded") -> "Dataset":
        """Give what was decoded and is not written."""
        found = cls.__new__(cls)
        found.store, found._train, found._meta = Path(os.devnull), "", {}  # where nothing lies
        found.source, found.removed, found._taken_out = Path(decoded.about.get("source", "/")), 0, []
        found.class_names = decoded.class_names
        found.__dict__ |= {"train": decoded.train, "test": decoded.test}
        found.__dict__ |= {"files": decoded.files, "owners": decoded.clients, "test_owners": decoded.test_clients}
        return found

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all images and labels."""
        return self._meta["fingerprint"]

    @cached_property
    def train(self) -> Split:
        """Memory-map the training images and their labels."""
        return self._split(self._train)

    @cached_property
    def test(self) -> Split:
        """Memory-map the test images and their labels."""
        return self._split(self._test)

    @property
    def channels(self) -> int:
        """Count the channels of an image, 1 or 3."""
        # stores of earlier versions do not name them
        return self._meta["channels"] if "channels" in self._meta else self.test.images.shape[-1]

    @property
    def patients(self) -> list[str] | None:
        """Name the patient of every training image ("" where one is not known); None where none is."""
        return None

    @cached_property
    def files(self) -> list[str]:
        """Name the files that the training images were read from, in their order; none where they are not known."""
        file = self.store / f"{self._train}_files.json"
        with undamaged(file):
            return json.loads(file.read_text()) if file.exists() else []

    @cached_property
    def owners(self) -> list[str]:
        """Name the client of each training image; none where the data set does not say whose they are."""
        return self._owners_of(self._train)

    @cached_property
    def test_owners(self) -> list[str]:
        """Name the client of each test image; none where nobody says whose they are."""
        return self._owners_of(self._test)

    @cached_property
    def held_out(self) -> str:
        """SHA-256 of the test images and their labels, as they were when they were decoded."""
        return self._meta.get("held_out") or fingerprint(self.test)

    def _owners_of(self, split: str) -> list[str]:
        file = self.store / f"{split}_clients.json"
        with undamaged(file):
            return json.loads(file.read_text()) if file.exists() else []

    @property
    def clients(self) -> list[str]:
        """Name the owners of images by their numbers, and those whose images were taken out; none for dealt images."""
        return sorted({*self.owners, *self._taken_out})

    def say_removed(self) -> None:
        """Warn where images of forgotten clients were taken out."""
        if self.removed:
            log.warning("%s is without %d images of forgotten clients (docs: what stays)", self.store, self.removed)

    def names_of(self, chosen: np.ndarray) -> list[str]:
        """Name training images: by their files within the source, or by their numbers before any was taken out.

        Args:
            chosen: their indices.
        """
        files = self.files
        if not files:
            return [str(number) for number in self._numbers[chosen]]
        return [image_name((self.source / files[number]).relative_to(self.source).as_posix()) for number in chosen]

    @cached_property
    def _numbers(self) -> np.ndarray:
        file = self.store / f"{self._train}_numbers.npy"
        return mapped(file) if file.exists() else np.arange(len(self.train.labels))

    def places_in(self, whole: "Dataset") -> np.ndarray:
        """Say where the training images lie in a copy from which none was taken out, int64 [N]."""
        if not self.files:
            return np.asarray(self._numbers)
        place = {file: number for number, file in enumerate(whole.files)}
        return np.array([place[file] for file in self.files], np.int64)

    def patients_of(self, chosen: np.ndarray) -> list[str] | None:
        """Say whose training images are, where the data set knows it."""
        patients = self.patients
        return None if patients is None else [patients[number] for number in chosen]

    def dealt(self, deal: str) -> list[np.ndarray] | None:
        """Give each client's indices as they were before images were taken out, less those; None for an unknown deal.

        Args:
            deal: names how the images were dealt out.
        """
        file = self.store / f"{self._train}_{deal}.npz"
        if not file.exists():
            return None
        with undamaged(file), np.load(file) as kept:
            return np.split(kept["indices"], kept["cuts"])

    def belongings(self, clients: Collection[int], slices: Sequence[np.ndarray]) -> "Belongings":
        """Give all images of clients, test images too where their owners are known, and beside them all others.

        Args:
            clients: by number.
            slices: each client's indices into the training images.
        """
        train, test = self.train, self.test
        places, is_other = np.concatenate([slices[c] for c in clients]), np.ones(len(train.labels), bool)
        is_other[places] = False
        is_held_out = self._is_test_of(~is_other)
        others = np.concatenate([train.images[is_other], test.images[~is_held_out]])
        own = Split(
            np.concatenate([train.images[places], test.images[is_held_out]]),
            np.concatenate([train.labels[places], test.labels[is_held_out]]),
        )
        files = [self.source / self.files[place] for place in places] if self.files else []
        return Belongings(own, others, files, self.source)

    def _is_test_of(self, marked: np.ndarray) -> np.ndarray:
        """Mark the test images of owners all of whose training images are marked, bool [M]."""
        if not self.test_owners:
            return np.zeros(len(self.test.labels), bool)
        return np.isin(self.test_owners, [*{*self.owners} - {*those(self.owners, ~marked)}])

    def without(self, gone: np.ndarray, deals: Mapping[str, Sequence[np.ndarray]]) -> int:
        """Write the training images anew without some, and delete the files that have them.

        With the last training image of an owner its test images go too, unless nothing would be left to test with.
        Nobody else's images are dealt out anew: who owned which is written down. A process that has the images open
        keeps what it has.

        Args:
            gone: which ones, bool [N].
            deals: by name, each client's indices into the images as they are now.

        Returns:
            How many test images went too.
        """
        if self.files and (missing := {"source", "image_size"} - self._meta.keys()):
            raise UserError(_damage(self.store / "meta.json", f"it has no {min(missing)}"))
        kept, kept_tests = ~gone, ~self._is_test_of(gone)
        place = np.cumsum(kept) - 1
        name, now = self._write_anew(self._train, self.train, kept, {"clients": self.owners, "files": self.files})
        test_name, test_now = self._test, self.test
        if kept_tests.any() and not kept_tests.all():
            self._meta["held_out"] = self.held_out
            owners = {"clients": self.test_owners}
            test_name, test_now = self._write_anew(self._test, self.test, kept_tests, owners)
        for deal, slices in deals.items():
            left = [place[owned[kept[owned]]] for owned in slices]
            cuts = np.cumsum([len(owned) for owned in left])[:-1]
            np.savez(self.store / f"{name}_{deal}.npz", indices=np.concatenate(left), cuts=cuts)
        if self.files:
            gone_files = {*those(self.files, gone)}
            self._meta["gone"] = sorted({*self._meta.get("gone", []), *(digest_of([file]) for file in gone_files)})
            self._expect_removal(gone_files)
        else:
            np.save(self.store / f"{name}_numbers.npy", self._numbers[kept])
        meta = {"train": name, "test": test_name, "removed": self.removed + int(gone.sum())}
        meta["taken_out"] = sorted({*self.clients} - {*those(self.owners, kept)})
        meta["fingerprint"] = _fingerprint(_arrays(now, test_now))
        new = self.store / "meta.json.new"
        new.write_text(json.dumps(self._meta | meta))
        os.replace(new, self.store / "meta.json")
        self._delete_all_but(name, test_name)
        return len(self.test.labels) - len(test_now.labels)

    def _write_anew(
        self, old: str, split: Split, kept: np.ndarray, lists: Mapping[str, Sequence[str]]
    ) -> tuple[str, Split]:
        """Write some of a split, and of lists of its images, under another name; gives the name, and what is left."""
        kind, _, count = old.partition("-")
        name, now = f"{kind}-{int(count or 0) + 1}", Split(split.images[kept], split.labels[kept])
        for part, array in now._asdict().items():
            np.save(self.store / f"{name}_{part}.npy", array)
        for what, values in lists.items():
            if values:
                (self.store / f"{name}_{what}.json").write_text(json.dumps(those(values, kept)))
        return name, now

    def tidy(self) -> None:
        """Delete what a crash left of images that were written anew, the old ones or the new ones."""
        self._delete_all_but(self._train, self._test)

    def _delete_all_but(self, *names: str) -> None:
        kept = tuple(f"{name}_" for name in names)
        for file in [*self.store.glob("train*"), *self.store.glob("test*")]:
            if not file.name.startswith(kept):
                file.unlink()

    def _expect_removal(self, files: set[str]) -> None:
        """List files of the source that are not needed any more.

        Once all that were ever listed are deleted, these images are used still.
        """
        source, (kind, _, *rest) = Path(self._meta["source"]), self.store.name.split("-")
        list_removed(self.store, sorted(files))
        listing = list(listing_of(source)) if source.is_dir() else []

        def store(rows: list[tuple]) -> Path:
            key = folder_key(source, self._meta["image_size"], [*rows, *self._meta.get("choices", [])])
            return self.store.with_name("-".join([kind, key, *rest]))

        gone = {*self._meta["gone"]}
        alias = store([row for row in listing if digest_of([row[0]]) not in gone])
        if store(listing).resolve() == self.store.resolve() and not alias.exists():
            alias.symlink_to(self.store.name)

    def _split(self, name: str) -> Split:
        images, labels = (self._array(f"{name}_{part}.npy") for part in ("images", "labels"))
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise UserError(_damage(self.store / f"{name}_images.npy", "it has not one image for every label"))
        return Split(images, labels)

    def _array(self, name: str) -> np.ndarray:
        return mapped(self.store / name)


class Belongings(NamedTuple):
    """Some clients' images, and whatever else there is to tell them from.

    Attributes:
        own: their images and labels.
        others: all other images, uint8 [N, H, W, channels].
        files: that theirs were read from, if that is known.
        source: the folder of all files, if that is known.
    """

    own: Split
    others: np.ndarray
    files: list[Path]
    source: Path


def those(values: Sequence[str], chosen: np.ndarray) -> list[str]:
    """Give the values that are chosen; none of none."""
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen] if values else []


def list_removed(store: Path, files: Sequence[str]) -> None:
    """List files of the source that a decoded copy has no need of any more; those of archives by their archive."""
    note_unneeded(store, files)
    add_to_list(store / REMOVED_FILES, map(at_source, files))


def unlist_removed(store: Path, files: Sequence[str]) -> None:
    """Take files of the source off the lists of those that a decoded copy has no need of: it needs them again."""
    note_needed(store, files)
    add_to_list(store / REMOVED_FILES, [], without={*map(at_source, files)})


def add_to_list(listed: Path, files: Iterable[str], *, without: Collection[str] = ()) -> None:
    """Add files to a list of files, one a line, and drop those that are gone; odd names are there in JSON's quotes.

    Args:
        listed: the list.
        files: to be added.
        without: files that are dropped, there or not.
    """
    lines = os.fsdecode(listed.read_bytes()).split("\n") if listed.exists() else []
    earlier = [json.loads(line) if line.startswith('"') else line for line in lines if line]
    left = [file for file in dict.fromkeys([*earlier, *files]) if file not in without and is_at_source(file)]
    text = "".join(f"{file if file.isprintable() else json.dumps(file)}\n" for file in left)
    listed.write_bytes(os.fsencode(text))


def about(store: Path) -> dict[str, Any]:
    """Read what a decoded copy says of itself.

    Raises:
        UserError: its `meta.json` is missing, damaged, or of something else.
    """
    file = store / "meta.json"
    kinds = {
        "class_names": list,
        "fingerprint": str,
        "source": str,
        "train": str,
        "test": str,
        "held_out": str,
        "removed": int,
        "channels": int,
        "taken_out": list,
    }
    with undamaged(file):
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it has no settings by name")
        for name, kind in kinds.items():
            if not isinstance(found.get(name, kind()), kind) or (name not in found and name in REQUIRED):
                raise ValueError(f"it has no {name}")
        return found


def mapped(file: Path) -> np.ndarray:
    """Memory-map an array.

    Raises:
        UserError: its file is missing or damaged.
    """
    with undamaged(file):
        return np.load(file, mmap_mode="r")


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Turn what is wrong with a file of a decoded copy into a UserError."""
    try:
        yield
    except Exception as error:  # json, numpy and zip have errors of their own
        raise UserError(_damage(file, str(error))) from error


def _damage(file: Path, reason: str) -> str:
    return f"{file} is missing or damaged ({reason}): remove the folder {file.parent}, its images are decoded anew"


class Decoded(NamedTuple):
    """What is decoded of a data set.

    Attributes:
        train: images and labels to train with.
        test: those that are held out.
        class_names: K names.
        about: what the store writes down of the source, if that is a folder.
        files: that the training images were read from, if that is known.
        clients: the name of each training image's client, if the data set says so.
        test_clients: that of each test image, likewise.
    """

    train: Split
    test: Split
    class_names: list[str]
    about: dict[str, Any] = {}  # noqa: RUF012
    files: list[str] = []  # noqa: RUF012
    clients: list[str] = []  # noqa: RUF012
    test_clients: list[str] = []  # noqa: RUF012

    def first(self, limit: int, test_limit: int) -> "Decoded":
        """Keep the first examples of each class in each split, as `first_per_class` does, and whose they are."""
        train, clients = _first(self.train, self.clients, limit)
        test, test_clients = _first(self.test, self.test_clients, test_limit)
        return self._replace(train=train, test=test, clients=clients, test_clients=test_clients)


def first_per_class(split: Split, limit: int) -> Split:
    """Keep the first `limit // K` examples of each of the K classes, in data-set order; all of them for 0.

    Args:
        split: to keep examples of.
        limit: how many, at most.

    Raises:
        UserError: a limit of less than one example a class.

    Example:
        >>> first_per_class(Split(np.arange(6), np.array([0, 1, 0, 1, 0, 1])), 4).images
        array([0, 1, 2, 3])
    """
    if not limit:
        return split
    classes = np.unique(split.labels)
    per_class = limit // len(classes)
    if per_class < 1:
        raise UserError(
            f"data.limit or data.test_limit: {limit} is less than one image for each of {len(classes)} classes"
        )
    keep = np.sort(np.concatenate([np.flatnonzero(split.labels == k)[:per_class] for k in classes]))
    return Split(split.images[keep], split.labels[keep])


def _first(split: Split, owners: Sequence[str], limit: int) -> tuple[Split, list[str]]:
    places, labels = first_per_class(Split(np.arange(len(split.labels)), split.labels), limit)
    images = split.images[places] if limit else split.images
    return Split(images, labels), [owners[int(place)] for place in places] if owners else []


def write(store: Path, decoded: Decoded) -> None:
    """Write a decoded copy, in one step.

    Raises:
        UserError: it has fewer than two classes.
    """
    if len(decoded.class_names) < 2:
        raise UserError(f"{store.name} has fewer than 2 classes")
    arrays = _arrays(decoded.train, decoded.test)
    with new_folder(store) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        if decoded.files:
            (folder / "train_files.json").write_text(json.dumps(decoded.files))
        for split, owners in {"train": decoded.clients, "test": decoded.test_clients}.items():
            if owners:
                (folder / f"{split}_clients.json").write_text(json.dumps(owners))
        meta = {"class_names": decoded.class_names, "channels": decoded.test.images.shape[-1], **decoded.about}
        (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": _fingerprint(arrays)}))


def _arrays(train: Split, test: Split) -> dict[str, np.ndarray]:
    return {
        f"{split}_{part}": array
        for split, data in (("train", train), ("test", test))
        for part, array in (("images", stored(data.images)), ("labels", np.ascontiguousarray(data.labels, np.int64)))
    }


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(array.data).digest() for array in arrays.values())).hexdigest()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `target` in one step; a process that comes second drops its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{UNFINISHED}{socket.gethostname()}-{os.getpid()}-"))
    try:
        yield folder
        if target.is_symlink() and not target.exists():  # another name of a copy that is gone
            target.unlink(missing_ok=True)
        try:
            os.replace(folder, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(data: Path) -> list[str]:
    """Delete what a crash left of decoded copies that were being written or deleted; gives the names.

    Args:
        data: the folder of all copies. A copy whose parts are clients has such folders too.
    """
    here = re.compile(rf"{re.escape(f'{UNFINISHED}{socket.gethostname()}')}-(\d+)-[^-]*")
    places = [data, *(folder for folder in data.iterdir() if folder.is_dir() and not folder.is_symlink())]
    left = [folder for place in places for folder in place.glob(f"{GONE}*")]
    for folder in (folder for place in places for folder in place.glob(f"{UNFINISHED}*")):
        writer = here.fullmatch(folder.name)
        if writer and not psutil.pid_exists(int(writer[1])):
            left.append(folder)
    for folder in left:
        shutil.rmtree(folder, ignore_errors=not folder.exists())  # it was in another one
    return [folder.name for folder in left]


def folder_key(source: Path, image_size: int, listing: Iterable[tuple | str]) -> str:
    """Name the decoded copy of a folder's files."""
    return digest_of([str(source), image_size, *listing])[:16]


def listing_of(source: Path, *, all_files: bool = False) -> Iterator[tuple]:
    """List the path, size and time of a file, or of every image, or every file, below a folder."""
    if not source.is_dir():
        files: Iterable[str] = [str(source)]
    elif all_files:
        files = sorted(str(file) for file in source.rglob("*") if file.is_file())
    else:
        files = image_paths(source)
    for file in files:
        stat = os.stat(file)
        yield file, stat.st_size, stat.st_mtime_ns


def digest_of(parts: list) -> str:
    """Compute the SHA-256 of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
