"""Decoded images whose owners are known: a part of the store for each client, which depends on that client alone.

Adding, changing or removing files of one client makes that client's part anew and touches no other. What is held out of
a client's images is in its part too, and leaves with it.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from fedunlearn.data.decoded import Split, fingerprint
from fedunlearn.data.folders import Listed, Owned
from fedunlearn.data.images import ImageReader, Reading, say_passed_over
from fedunlearn.data.joined import Joined
from fedunlearn.data.removal import remove_folder
from fedunlearn.data.store import (
    Belongings,
    Dataset,
    digest_of,
    list_removed,
    mapped,
    new_folder,
    undamaged,
    unlist_removed,
)
from fedunlearn.errors import UserError, printable

NO_IMAGES = Split(np.empty((0, 1, 1, 3), np.uint8), np.empty(0, np.int64))

MARKER, REMOVED = "owners.json", "removed.json"
"""In a store: where the images come from; and whose were taken out, with their number and their classes."""

SPLITS = ("train", "test")

log = logging.getLogger("fedunlearn")


class DecodedPart(NamedTuple):
    """The decoded images of one client, or those that are held out and nobody's.

    Attributes:
        splits: images and labels to train with and those that are held out; labels count in `classes`.
        classes: names of the part's own classes, sorted.
        files: by split, relative to the source.
        patients: of the training images; "" where one is not known.
    """

    splits: dict[str, Split]
    classes: list[str]
    files: dict[str, list[str]]
    patients: list[str]

    @property
    def about(self) -> dict[str, Any]:
        """Give what its folder says of it."""
        about = {"classes": self.classes, "files": self.files, "patients": self.patients}
        counts = {split: len(own.labels) for split, own in self.splits.items()}
        return {**about, **counts, "fingerprint": _fingerprint(self.classes, self.splits.values())}


@dataclass(frozen=True)
class Part:
    """One client's part of a data set; its images are opened when they are first asked for.

    Attributes:
        about: its classes, numbers of images, files, patients and fingerprint; nothing where there is no part.
        opened: gives a split, whose labels count in its own classes.
    """

    about: Mapping[str, Any] = field(default_factory=dict)
    opened: Callable[[str], Split] = lambda split: NO_IMAGES

    @cached_property
    def train(self) -> Split:
        """The images to train with."""
        return self.opened("train")

    @cached_property
    def test(self) -> Split:
        """The images that are held out."""
        return self.opened("test")

    def split(self, name: str) -> Split:
        """Give the images and labels of a split."""
        return self.train if name == "train" else self.test

    def count(self, split: str) -> int:
        """Count the images of a split."""
        return self.about.get(split, 0)

    @property
    def classes(self) -> list[str]:
        """Name its own classes."""
        return self.about.get("classes", [])

    def files(self, split: str) -> list[str]:
        """Name the files of a split, relative to the source."""
        return self.about["files"][split] if self.about else []

    def fingerprint(self) -> str:
        """Compute the SHA-256 of all its images and their classes; nothing where there are none."""
        if not any(map(self.count, SPLITS)):
            return ""
        return _fingerprint(self.classes, [self.train, self.test])


class OwnedDataset(Dataset):
    """Open decoded images whose owners are known; who asks for one client's images touches no other's.

    Args:
        store: the folder with the parts.
        source: that files are relative to.
        parts: by the client's name, in the order of their numbers.
        common: held-out images that are nobody's.
        removed: whose images were taken out, with their number and their classes.
        size: pixels a side.
        classes: names of all classes; none takes those that the parts have.

    Attributes:
        parts: by the client's number; the last one is nobody's.
    """

    def __init__(
        self,
        store: Path,
        source: Path,
        parts: Mapping[str, Part],
        common: Part,
        removed: Mapping[str, Mapping[str, Any]],
        size: int,
        classes: Sequence[str] = (),
    ) -> None:
        self.store, self.source, self._clients = store, source, list(parts)
        self.parts, self._size = [*parts.values(), common], size
        here = [about for client, about in removed.items() if client in parts]
        self.removed = sum(about["train"] for about in here)
        named = [*(part.classes for part in self.parts), *(about["classes"] for about in here)]
        found = {name for names in named for name in names}
        self.class_names = list(classes) or sorted(found)
        if unknown := sorted(found - {*self.class_names}):
            raise UserError(
                f"data.root={source} has images of class {printable(unknown[0])}, which is none of "
                f"{printable(', '.join(self.class_names))}"
            )
        if len(self.class_names) < 2:
            raise UserError(f"data.root={source} has images of {len(self.class_names)} class: at least 2 are needed")

    @property
    def clients(self) -> list[str]:
        """Name the clients by their numbers."""
        return self._clients

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all images and of whose they are, as they were when they were decoded."""
        return digest_of([self.class_names, self.clients, *(part.about.get("fingerprint") for part in self.parts)])

    @property
    def version(self) -> tuple[str, str, str]:
        """Say which state of the images this is."""
        return "", "", self.fingerprint

    @cached_property
    def train(self) -> Split:
        """Join the training images of all clients, in the order of their numbers."""
        return self._joined("train")

    @cached_property
    def test(self) -> Split:
        """Join the held-out images: the clients', in the order of their numbers, then those that are nobody's."""
        return self._joined("test")

    @property
    def channels(self) -> int:
        """Count the channels of an image: 3."""
        return 3

    @cached_property
    def files(self) -> list[str]:
        """Name the files that the training images were read from, in their order."""
        return [file for part in self.parts for file in part.files("train")]

    @cached_property
    def owners(self) -> list[str]:
        """Name the client of each training image."""
        return self._owners_of("train")

    @cached_property
    def test_owners(self) -> list[str]:
        """Name the client of each test image; nothing for those that are nobody's."""
        return self._owners_of("test")

    def _owners_of(self, split: str) -> list[str]:
        return [
            name for name, part in zip([*self.clients, ""], self.parts, strict=True) for _ in range(part.count(split))
        ]

    @property
    def patients(self) -> list[str] | None:
        """Name the patient of every training image ("" where one is not known); None where none is."""
        patients = [patient for part in self.parts for patient in part.about.get("patients", [])]
        return patients if any(patients) else None

    @property
    def slices(self) -> list[np.ndarray]:
        """Give each client's indices into the training images."""
        ends = np.cumsum([0, *(part.count("train") for part in self.parts)])
        return [np.arange(ends[client], ends[client + 1]) for client in range(len(self.clients))]

    def fingerprints(self) -> dict[str, str]:
        """Compute the SHA-256 of what each client has, what is held out of it included, and of nobody's images."""
        own = {str(client): part.fingerprint() for client, part in enumerate(self.parts[:-1])}
        return own | {"held-out": self.parts[-1].fingerprint()}

    def dealt(self, deal: str) -> list[np.ndarray] | None:
        """Give each client's indices: nothing else deals these images out."""
        return self.slices

    def belongings(
        self, clients: Collection[int], slices: Sequence[np.ndarray], owners: Collection[str] = ()
    ) -> Belongings:
        """Give all images of clients, held-out ones too, and beside them all others."""

        def images_of(is_wanted: bool) -> np.ndarray:
            chosen = [part for c, part in enumerate(self.parts) if (c in clients) == is_wanted]
            each = [part.split(split).images for part in chosen for split in SPLITS if part.count(split)]
            return np.concatenate([np.empty((0, self._size, self._size, 3), np.uint8), *each])

        own = [(c, split) for c in sorted(clients) for split in SPLITS if self.parts[c].count(split)]
        labels = [self._labels(split, c) for c, split in own]
        files = [file for c, split in own for file in self.parts[c].files(split)]
        return Belongings(
            images_of(True), labels, images_of(False), [self.source / file for file in files], self.source
        )

    def _joined(self, split: str) -> Split:
        lengths, shape = [part.count(split) for part in self.parts], (self._size, self._size, 3)
        images = Joined(lengths, lambda piece: self.parts[piece].split(split).images, shape, np.uint8)
        labels = Joined(lengths, partial(self._labels, split), (), np.int64)
        return Split(cast(np.ndarray, images), cast(np.ndarray, labels))

    def _labels(self, split: str, piece: int) -> np.ndarray:
        part = self.parts[piece]
        place = np.array([self.class_names.index(name) for name in part.classes], np.int64)
        return place[part.split(split).labels]


@dataclass(frozen=True)
class OwnedSource:
    """Where images with known owners come from, and where their decoded copy is.

    Args:
        store: the folder of the decoded copy.
        owned: the image files by their owners.
        clients: the names of those that take part, by number.
        reading: how files become images.
        limit, test_limit: keep that many images of each client, the first of each class in equal numbers; 0 keeps all.
        skip_bad: whether to go on without files that cannot be read.
        classes: names of all classes; none takes those of the images.
    """

    store: Path
    owned: Owned
    clients: Sequence[str]
    reading: Reading
    limit: int = 0
    test_limit: int = 0
    skip_bad: bool = False
    classes: Sequence[str] = ()

    @property
    def root(self) -> Path:
        """The folder that the images lie in."""
        return self.owned.root

    def open(self) -> OwnedDataset:
        """Open the decoded copy; the parts that are missing are decoded before.

        Raises:
            UserError: files cannot be read, there are fewer than two classes, or none that is held out.
        """
        missing = {name: images for name, images in self._wanted().items() if not self.folder(name, images).is_dir()}
        if missing:
            self._write(missing)
        if gone := [name for name, images in self._wanted().items() if not self.folder(name, images).is_dir()]:
            who = f"client {printable(gone[0])}" if gone[0] else "nobody"
            raise UserError(f"{self.store} lost the decoded images of {who} to another process: repeat the command")
        found = self.opened()
        if not self.classes and not len(found.test.labels):
            raise UserError(
                f"data.root={self.root} has no images for testing: give six of a class and client, or root/test/class"
            )
        return found

    def opened(self) -> OwnedDataset:
        """Open the decoded copy as it is; who has no part there has no images."""
        parts = {name: self._part(name, images) for name, images in self._wanted().items()}
        clients = {name: parts.get(name, Part()) for name in self.clients}
        return self._joined(clients, parts.get("", Part()), self.removed())

    def in_memory(self) -> OwnedDataset:
        """Decode everything anew, what was taken out too, and write nothing."""
        reader = self._reader(self._listed().values())
        parts = {name: self._decoded(images, reader) for name, images in self._listed().items()}
        reader.conclude(skip_bad=self.skip_bad)
        opened = {name: Part(part.about, part.splits.__getitem__) for name, part in parts.items()}
        clients = {name: opened.get(name, Part()) for name in self.clients}
        return self._joined(clients, opened.get("", Part()), {})

    def _joined(self, clients: Mapping[str, Part], common: Part, removed: Mapping[str, Any]) -> OwnedDataset:
        return OwnedDataset(self.store, self.root, clients, common, removed, self.reading.size, self.classes)

    def removed(self) -> dict[str, dict[str, Any]]:
        """Say whose images were taken out: by name, how many and of which classes."""
        return _removed(self.store)

    def take_out(self, names: Iterable[str]) -> dict[str, int]:
        """Delete the parts of clients, and list the files of the source that they were read from.

        Returns:
            How many decoded images were deleted, training and held-out ones, by client.
        """
        counts, removed, files = {}, self.removed(), []
        for name in names:
            images = self.owned.images.get(name, [])
            part = self._part(name, self._listed().get(name, []))
            counts[name] = sum(map(part.count, SPLITS))
            earlier = removed.get(name, {"train": 0, "classes": []})
            classes = sorted({*earlier["classes"], *part.classes})
            removed[name] = {"train": part.count("train") or earlier["train"], "classes": classes}
            files += [str(self.root / image.file) for image in images]
        _write_json(self.store / REMOVED, removed)
        list_removed(self.store, files)
        self.delete_all_but(self.part_names(), of=set(counts))
        return counts

    def has_files(self, name: str) -> bool:
        """Say whether the source has images of a client."""
        return bool(self.owned.images.get(name))

    def take_back(self, names: Iterable[str]) -> None:
        """Let clients have images again that were taken out.

        Raises:
            UserError: their files were deleted.
        """
        removed = self.removed()
        for name in [name for name in names if name in removed]:
            if not self.has_files(name):
                raise UserError(f"readmit: the files with the images of client {name} were deleted")
            del removed[name]
            unlist_removed(self.store, [str(self.root / image.file) for image in self.owned.images[name]])
        _write_json(self.store / REMOVED, removed)

    def delete_all_but(self, keys: Collection[str], *, of: Collection[str] | None = None) -> list[str]:
        """Delete parts that are not named; gives their names.

        Args:
            keys: names of the folders of parts.
            of: delete parts of these clients alone.
        """
        deleted = []
        for file in sorted(self.store.glob("*/meta.json")):
            if file.parent.name in keys:
                continue
            with undamaged(file):
                client = json.loads(file.read_text())["client"]
            if of is None or client in of:
                remove_folder(file.parent)
                deleted.append(file.parent.name)
        return deleted

    def part_names(self) -> set[str]:
        """Name the folders of the parts that this run's images are in."""
        return {self.folder(name, images).name for name, images in self._wanted().items()}

    def folder(self, client: str, images: Sequence[Listed]) -> Path:
        """Give the folder of a client's part: it depends on these files and on nobody else's."""
        rows: list[Any] = [client]
        for image in images:
            stat = os.stat(self.root / image.file)
            rows.append((*image, stat.st_size, stat.st_mtime_ns))
        return self.store / digest_of(rows)[:16]

    def _listed(self) -> dict[str, list[Listed]]:
        """The image files of those who have any, and under no name those that are nobody's."""
        own = {name: self.owned.images.get(name, []) for name in self.clients}
        return {name: images for name, images in {**own, "": self.owned.common}.items() if images}

    def _wanted(self) -> dict[str, list[Listed]]:
        """The same without those whose images were taken out."""
        removed = self.removed()
        return {name: images for name, images in self._listed().items() if name not in removed}

    def _part(self, client: str, images: Sequence[Listed]) -> Part:
        folder = self.folder(client, images)
        file = folder / "meta.json"
        if not images or not folder.is_dir():
            return Part()
        with undamaged(file):
            about = json.loads(file.read_text())
            if not isinstance(about["classes"], list) or not all(isinstance(about[split], int) for split in SPLITS):
                raise ValueError("it does not say what the part has")
        return Part(about, partial(_opened, folder))

    def _reader(self, groups: Iterable[Sequence[Listed]]) -> ImageReader:
        return ImageReader(self.reading, total=sum(map(len, groups)))

    def _write(self, missing: Mapping[str, Sequence[Listed]]) -> None:
        """Decode parts and write each, but for those that have unreadable files."""
        log.info("decoding %s (once): %s", self.root, _in_words(missing))
        say_passed_over(self.root, self.owned.passed_over)
        self.store.mkdir(parents=True, exist_ok=True)
        _write_json(self.store / MARKER, {"source": str(self.root)})
        reader = self._reader(missing.values())
        for name, images in missing.items():
            earlier, part = len(reader.bad), self._decoded(images, reader)
            if len(reader.bad) == earlier or self.skip_bad:
                _save(self.folder(name, images), name, part)
        reader.conclude(skip_bad=self.skip_bad)

    def _decoded(self, images: Sequence[Listed], reader: ImageReader) -> DecodedPart:
        chosen = {
            "train": _first_per_class([image for image in images if not image.is_test], self.limit),
            "test": _first_per_class([image for image in images if image.is_test], self.test_limit),
        }
        read = {
            split: reader.read((self.root / image.file for image in own), len(own)) for split, own in chosen.items()
        }
        good = {
            split: [image for image, is_good in zip(chosen[split], read[split][1], strict=True) if is_good]
            for split in SPLITS
        }
        classes = sorted({image.label for own in good.values() for image in own})
        splits = {
            split: Split(read[split][0], np.array([classes.index(image.label) for image in own], np.int64))
            for split, own in good.items()
        }
        files = {split: [image.file for image in own] for split, own in good.items()}
        return DecodedPart(splits, classes, files, [image.patient for image in good["train"]])


def removed_from(root: Path, cache: Path) -> set[str]:
    """Name the clients whose images were taken out of any decoded copy of a folder.

    Args:
        root: the folder.
        cache: that the copies are in.
    """
    names: set[str] = set()
    for marker in cache.glob(f"*/{MARKER}"):
        with suppress(UserError), undamaged(marker):  # whoever opens a damaged copy says so
            if json.loads(marker.read_text())["source"] == str(root):
                names |= _removed(marker.parent).keys()
    return names


def _removed(store: Path) -> dict[str, dict[str, Any]]:
    file = store / REMOVED
    with undamaged(file):
        return json.loads(file.read_text()) if file.exists() else {}


def _first_per_class(images: Sequence[Listed], limit: int) -> list[Listed]:
    """Keep the first `limit // K` images of each of the K classes, one at least; all for 0."""
    most = max(1, limit // max(1, len({image.label for image in images}))) if limit else len(images)
    kept: dict[str, list[Listed]] = {}
    for image in images:
        if len(own := kept.setdefault(image.label, [])) < most:
            own.append(image)
    return [image for own in kept.values() for image in own]


def _in_words(missing: Mapping[str, Sequence[Listed]]) -> str:
    count = sum(map(len, missing.values()))
    names = [name for name in missing if name]
    who = f"client {names[0]}" if len(names) == 1 else f"{len(names)} clients"
    return f"{count:,} images of {who if names else 'nobody, held out'}"


def _fingerprint(classes: Sequence[str], splits: Iterable[Split]) -> str:
    return digest_of([list(classes), *map(fingerprint, splits)])


def _save(folder: Path, client: str, part: DecodedPart) -> None:
    with new_folder(folder) as new:
        for split, (images, labels) in part.splits.items():
            np.save(new / f"{split}_images.npy", images)
            np.save(new / f"{split}_labels.npy", labels)
        (new / "meta.json").write_text(json.dumps({"client": client, **part.about}))


def _opened(folder: Path, split: str) -> Split:
    images, labels = (mapped(folder / f"{split}_{what}.npy") for what in ("images", "labels"))
    return Split(images, labels)


def _write_json(file: Path, content: Any) -> None:
    new = file.with_name(f".{file.name}.{os.getpid()}")  # another process may write the same
    new.write_text(json.dumps(content))
    os.replace(new, file)
