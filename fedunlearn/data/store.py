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

from fedunlearn.data.decoded import Decoded, Split, fingerprint, stored, those
from fedunlearn.data.images import image_paths
from fedunlearn.data.removal import GONE
from fedunlearn.data.selection import image_name
from fedunlearn.data.unpacked import at_source, is_at_source, note_needed, note_unneeded
from fedunlearn.errors import UserError

REMOVED_FILES = "files-to-delete.txt"
"""In a store: files of the source that nobody needs any more, one a line."""

ROWS = 1024
"""Images that are copied together."""
UNFINISHED = ".new-"
"""How names of folders begin that are being written."""
REQUIRED = ("class_names", "fingerprint")
"""What every store says of itself."""

log = logging.getLogger("fedunlearn")


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
        return self._list(self._train, "files")

    @cached_property
    def owners(self) -> list[str]:
        """Name the client of each training image; none where the data set does not say whose they are."""
        return self._list(self._train, "clients")

    @cached_property
    def test_owners(self) -> list[str]:
        """Name the client of each test image; none where nobody says whose they are."""
        return self._list(self._test, "clients")

    @cached_property
    def test_fingerprint(self) -> str:
        """SHA-256 of the test images and their labels, as they were when they were decoded."""
        return self._meta.get("test_fingerprint") or fingerprint(self.test)

    def _list(self, split: str, what: str) -> list[str]:
        file = self._file_of(split, f"{what}.json")
        with undamaged(file):
            return json.loads(file.read_text()) if file.exists() else []

    def _file_of(self, split: str, what: str) -> Path:
        """Give the path of a file that a split may have.

        Raises:
            UserError: it is missing, since another process has written the images anew.
        """
        file = self.store / f"{split}_{what}"
        if not self._meta or file.exists():  # of what is in memory no file exists
            return file
        now = about(self.store)
        if (now.get("train", "train"), now.get("test", "test")) != (self._train, self._test):
            raise UserError(f"{self.store} was written anew meanwhile, with other images: start again what reads it")
        return file

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
        file = self._file_of(self._train, "numbers.npy")
        return mapped(file) if file.exists() else np.arange(len(self.train.labels))

    def places_in(self, whole: "Dataset") -> np.ndarray:
        """Say where the training images lie in a data set from which none was taken out, int64 [N].

        Raises:
            UserError: they are not all there, as they are here.
        """
        changed = UserError(f"{self.source} does not give the images any more that {self.store} was made of")
        if self.files:
            place = {file: number for number, file in enumerate(whole.files)}
            places = np.array([place.get(file, len(place)) for file in self.files], np.int64)
        else:
            places = np.asarray(self._numbers)
        if places.max(initial=-1) >= len(whole.train.labels) or self.test_fingerprint != whole.test_fingerprint:
            raise changed
        for first in range(0, len(places), ROWS):
            some, there = slice(first, first + ROWS), places[first : first + ROWS]
            if any(not np.array_equal(mine[some], theirs[there]) for mine, theirs in zip(self.train, whole.train)):  # noqa: B905
                raise changed
        return places

    def patients_of(self, chosen: np.ndarray) -> list[str] | None:
        """Say whose training images are, where the data set knows it."""
        patients = self.patients
        return None if patients is None else [patients[number] for number in chosen]

    def dealt(self, deal: str) -> list[np.ndarray] | None:
        """Give each client's indices as they were before images were taken out, less those; None for an unknown deal.

        Args:
            deal: names how the images were dealt out.
        """
        kept = self._deal(deal)
        return np.split(kept["indices"], kept["cuts"]) if kept else None

    def counts_of(self, deal: str) -> list[int] | None:
        """Give how many images each client was dealt, those that were taken out too; None for an unknown deal."""
        kept, left = self._deal(deal), self.dealt(deal)
        if kept is None or left is None:
            return None
        # deals of earlier versions do not say it: whoever has none had some
        return kept["counts"].tolist() if "counts" in kept else [max(1, len(own)) for own in left]

    def _deal(self, deal: str) -> dict[str, np.ndarray] | None:
        file = self._file_of(self._train, f"{deal}.npz")
        if not file.exists():
            return None
        with undamaged(file), np.load(file) as kept:
            return dict(kept)

    @property
    def deals(self) -> list[str]:
        """Name the deals that are written down."""
        return [file.stem.removeprefix(f"{self._train}_") for file in self.store.glob(f"{self._train}_*.npz")]

    @property
    def version(self) -> tuple[str, str, str]:
        """Say which state of the images this is: other ones after every `rewrite`."""
        return self._train, self._test, self.fingerprint

    def tests_of(self, owners: Collection[str]) -> np.ndarray:
        """Mark the test images of some owners, bool [M]."""
        marked = np.zeros(len(self.test.labels), bool)
        if self.test_owners:
            marked[:] = [owner in owners for owner in self.test_owners]
        return marked

    def belongings(
        self, clients: Collection[int], slices: Sequence[np.ndarray], owners: Collection[str] = ()
    ) -> "Belongings":
        """Give all images of clients, and beside them all others.

        Args:
            clients: by number.
            slices: each client's indices into the training images.
            owners: names of theirs that have test images.
        """
        train, test, is_test = self.train, self.test, self.tests_of(owners)
        places, is_other = np.concatenate([slices[c] for c in clients]), np.ones(len(train.labels), bool)
        is_other[places] = False
        others = np.concatenate([train.images[is_other], test.images[~is_test]])
        images = np.concatenate([train.images[places], test.images[is_test]])
        files = [self.source / self.files[place] for place in places] if self.files else []
        labels = [*(train.labels[slices[client]] for client in clients), test.labels[is_test]]
        return Belongings(images, labels, others, files, self.source)

    def without(
        self, gone: np.ndarray, deals: Mapping[str, Sequence[np.ndarray]], owners: Collection[str] = ()
    ) -> None:
        """Take training images out, and the test images of some owners; the rest is as in `rewrite`.

        Args:
            gone: which training images, bool [N].
            deals: by name, each client's indices into the training images as they are now.
            owners: their names. Somebody else has to have test images.
        """
        self.rewrite(self, ~gone, deals, owners)

    def rewrite(
        self, whole: "Dataset", kept: np.ndarray, deals: Mapping[str, Sequence[np.ndarray]], owners: Collection[str]
    ) -> None:
        """Write the images anew, as some of a data set that has them all, and delete the files that have others.

        Nobody else's images are dealt out anew: who owned which is written down. A process that has the images open
        keeps what it has. A crash leaves the images as they were, or as they are to be.

        Args:
            whole: this one, or what can be decoded of the source.
            kept: which of its training images stay, bool [N].
            deals: by name, each client's indices into its training images.
            owners: the names of those whose test images do not stay.
        """
        if whole.files and (missing := {"source", "image_size"} - self._meta.keys()):
            raise UserError(_damage(self.store / "meta.json", f"it has no {min(missing)}"))
        place, kept_tests = np.cumsum(kept) - 1, ~whole.tests_of(owners)
        name, now = self._write_anew(self._train, whole.train, kept, {"clients": whole.owners, "files": whole.files})
        test_name, test_now = self._test, self.test
        if len(test_now.labels) != np.count_nonzero(kept_tests):
            test_name, test_now = self._write_anew(self._test, whole.test, kept_tests, {"clients": whole.test_owners})
        for deal, slices in deals.items():
            left = [place[own[kept[own]]] for own in slices]
            cuts = np.cumsum([len(own) for own in left])[:-1]
            counts = np.maximum([len(own) for own in slices], self.counts_of(deal) or 0)
            np.savez(self.store / f"{name}_{deal}.npz", indices=np.concatenate(left), cuts=cuts, counts=counts)
        if whole.files:
            self._expect_files({*those(whole.files, kept)}, {*those(whole.files, ~kept)})
        else:
            np.save(self.store / f"{name}_numbers.npy", whole._numbers[kept])
        meta = {
            "train": name,
            "test": test_name,
            "test_fingerprint": whole.test_fingerprint,
            "removed": self.removed + len(self.train.labels) - len(now.labels),
            "taken_out": sorted({*self.clients} - {*those(whole.owners, kept)}),
            "fingerprint": _fingerprint(_arrays(now, test_now)),
        }
        new = self.store / "meta.json.new"
        new.write_text(json.dumps(self._meta | meta))
        os.replace(new, self.store / "meta.json")
        self._delete_all_but(name, test_name)

    def _write_anew(
        self, old: str, split: Split, kept: np.ndarray, lists: Mapping[str, Sequence[str]]
    ) -> tuple[str, Split]:
        """Write some of a split, and of lists of its images, under another name; gives the name, and what is left."""
        kind, _, count = old.partition("-")
        name, places = f"{kind}-{int(count or 0) + 1}", np.flatnonzero(kept)
        _save_some(self.store / f"{name}_images.npy", split.images, places, stored(split.images[:0]).dtype)
        _save_some(self.store / f"{name}_labels.npy", split.labels, places, np.dtype(np.int64))
        for what, values in lists.items():
            if values:
                (self.store / f"{name}_{what}.json").write_text(json.dumps(those(values, kept)))
        return name, self._split(name)

    def tidy(self) -> None:
        """Delete what a crash left of images that were written anew, the old ones or the new ones."""
        self._delete_all_but(self._train, self._test)

    def _delete_all_but(self, *names: str) -> None:
        kept = tuple(f"{name}_" for name in names)
        for file in [*self.store.glob("train*"), *self.store.glob("test*")]:
            if not file.name.startswith(kept):
                file.unlink()

    def _expect_files(self, kept: set[str], gone: set[str]) -> None:
        """List files of the source that are not needed any more, and those no longer that are.

        Once all that were ever listed are deleted, these images are used still.
        """
        unlist_removed(self.store, sorted(kept))
        list_removed(self.store, sorted(gone))
        earlier = {*self._meta.get("gone", [])} - {digest_of([file]) for file in kept}
        digests = earlier | {digest_of([file]) for file in gone}
        self._meta["gone"] = sorted(digests)
        if self.is_of(listing := self.listing()):
            self.name_after([row for row in listing if digest_of([row[0]]) not in digests])

    def listing(self) -> list[tuple]:
        """List the image files of the source, as they are now."""
        return list(listing_of(self.source)) if self.source.is_dir() else []

    def is_of(self, listing: list[tuple]) -> bool:
        """Say whether this is the copy that whoever names a source with these files finds."""
        return self._named(listing).resolve() == self.store.resolve()

    def name_after(self, listing: list[tuple]) -> None:
        """Let whoever names a source with these files find this copy."""
        if not (alias := self._named(listing)).exists():
            alias.symlink_to(self.store.name)

    def _named(self, listing: list[tuple]) -> Path:
        kind, _, *rest = self.store.name.split("-")
        with undamaged(self.store / "meta.json"):
            key = folder_key(self.source, self._meta["image_size"], [*listing, *self._meta.get("choices", [])])
        return self.store.with_name("-".join([kind, key, *rest]))

    def _split(self, name: str) -> Split:
        images, labels = (mapped(self._file_of(name, f"{part}.npy")) for part in ("images", "labels"))
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise UserError(_damage(self.store / f"{name}_images.npy", "it has not one image for every label"))
        return Split(images, labels)


class Belongings(NamedTuple):
    """Some clients' images, and whatever else there is to tell them from.

    Attributes:
        images: theirs, uint8 [N, H, W, channels] or fp32.
        labels: of these images, in sequences that lie together.
        others: all other images, [M, H, W, channels].
        files: that theirs were read from, if that is known.
        source: the folder of all files, if that is known.
    """

    images: np.ndarray
    labels: list[np.ndarray]
    others: np.ndarray
    files: list[Path]
    source: Path


def _save_some(file: Path, array: np.ndarray, places: np.ndarray, dtype: np.dtype) -> None:
    """Save some rows of an array, without having all of them in memory."""
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
    with open(file, "wb") as saved:
        np.lib.format.write_array_header_1_0(saved, {**form, "shape": (len(places), *array.shape[1:])})
        for first in range(0, len(places), ROWS):
            saved.write(np.ascontiguousarray(array[places[first : first + ROWS]], dtype).data)


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
        "test_fingerprint": str,
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
