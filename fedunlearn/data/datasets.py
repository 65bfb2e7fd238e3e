"""Decode image data sets once, into uint8 arrays on disk that every process memory-maps."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedunlearn.errors import UserError

NAMES = ("digits", "cifar10", "cifar100", "folder", "random")
"""The data sets that `load` knows."""

REMOVED_FILES = "files-to-delete.txt"
"""In a store: files of the source that nobody needs any more, one a line."""

REQUIRED = ("class_names", "fingerprint")
"""What every store says of itself."""

log = logging.getLogger("fedunlearn")


class Split(NamedTuple):
    """Pair images with their labels.

    Attributes:
        images: uint8 [N, H, W, channels].
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
    images, labels = np.ascontiguousarray(split.images, np.uint8), np.ascontiguousarray(split.labels, np.int64)
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


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
        fingerprint: SHA-256 of all images and labels.
        removed: how many training images of forgotten clients were taken out (`without`).

    Example:
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
        self.class_names: list[str] = self._meta["class_names"]
        self.fingerprint: str = self._meta["fingerprint"]

    @cached_property
    def train(self) -> Split:
        """Memory-map the training images and their labels."""
        return self._split(self._train)

    @cached_property
    def test(self) -> Split:
        """Memory-map the test images and their labels."""
        return self._split("test")

    @property
    def channels(self) -> int:
        """Count the channels of an image, 1 or 3."""
        # stores of earlier versions do not name them
        return self._meta["channels"] if "channels" in self._meta else self.test.images.shape[-1]

    @property
    def files(self) -> list[str]:
        """Name the files that the training images were read from, in their order; none where they are not known."""
        file = self.store / f"{self._train}_files.json"
        with _undamaged(file):
            return json.loads(file.read_text()) if file.exists() else []

    def names_of(self, chosen: np.ndarray) -> list[str]:
        """Name training images: by their files within the source; without files by their numbers.

        Args:
            chosen: their indices.
        """
        files = self.files
        if not files:
            return [str(number) for number in chosen]
        source = Path(self._meta["source"])
        return [Path(files[number]).relative_to(source).as_posix() for number in chosen]

    def patients_of(self, chosen: np.ndarray) -> list[str] | None:
        """Say whose training images are, where the data set knows it."""
        return None

    def dealt(self, deal: str) -> list[np.ndarray] | None:
        """Give each client's indices as they were before images were taken out, less those; None for an unknown deal.

        Args:
            deal: names how the images were dealt out.
        """
        file = self.store / f"{self._train}_{deal}.npz"
        if not file.exists():
            return None
        with _undamaged(file), np.load(file) as kept:
            return np.split(kept["indices"], kept["cuts"])

    def without(self, gone: np.ndarray, deals: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Write the training images anew without some, and delete the files that have them.

        Nobody else's images are dealt out anew: who owned which is written down. A process that has the images open
        keeps what it has.

        Args:
            gone: which ones, bool [N].
            deals: by name, each client's indices into the images as they are now.
        """
        if self.files and (missing := {"source", "image_size"} - self._meta.keys()):
            raise UserError(_damage(self.store / "meta.json", f"it has no {min(missing)}"))
        kept, train = ~gone, self.train
        place = np.cumsum(kept) - 1
        name = f"train-{int(self._train.partition('-')[2] or 0) + 1}"
        now = Split(train.images[kept], train.labels[kept])
        for part, array in now._asdict().items():
            np.save(self.store / f"{name}_{part}.npy", array)
        for deal, slices in deals.items():
            left = [place[owned[kept[owned]]] for owned in slices]
            cuts = np.cumsum([len(owned) for owned in left])[:-1]
            np.savez(self.store / f"{name}_{deal}.npz", indices=np.concatenate(left), cuts=cuts)
        if files := self.files:
            (self.store / f"{name}_files.json").write_text(
                json.dumps([f for f, k in zip(files, kept, strict=True) if k])
            )
            self._expect_removal({f for f, k in zip(files, kept, strict=True) if not k})
        removed = self.removed + int(gone.sum())
        meta = {"train": name, "removed": removed, "fingerprint": _fingerprint(_arrays(now, self.test))}
        new = self.store / "meta.json.new"
        new.write_text(json.dumps(self._meta | meta))
        os.replace(new, self.store / "meta.json")
        for file in self.store.glob("train*"):
            if not file.name.startswith(f"{name}_"):
                file.unlink()

    def _expect_removal(self, files: set[str]) -> None:
        """List files of the source that are not needed any more; once they are deleted, these images are used still."""
        source, (kind, _, *rest) = Path(self._meta["source"]), self.store.name.split("-")
        listed = self.store / REMOVED_FILES
        earlier = listed.read_text().splitlines() if listed.exists() else []
        left = [file for file in [*earlier, *sorted(files)] if Path(file).exists()]
        listed.write_text("".join(f"{file}\n" for file in left))
        listing = list(_listing(source)) if source.is_dir() else []

        def store(rows: list[tuple]) -> Path:
            return self.store.with_name("-".join([kind, _folder_key(source, self._meta["image_size"], rows), *rest]))

        alias = store([row for row in listing if row[0] not in files])
        if store(listing).resolve() == self.store.resolve() and not alias.exists():
            alias.symlink_to(self.store.name)

    def _split(self, name: str) -> Split:
        images, labels = (self._array(f"{name}_{part}.npy") for part in ("images", "labels"))
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise UserError(_damage(self.store / f"{name}_images.npy", "it has not one image for every label"))
        return Split(images, labels)

    def _array(self, name: str) -> np.ndarray:
        with _undamaged(self.store / name):
            return np.load(self.store / name, mmap_mode="r")


def about(store: Path) -> dict[str, Any]:
    """Read what a decoded copy says of itself.

    Raises:
        UserError: its `meta.json` is missing, damaged, or of something else.
    """
    file = store / "meta.json"
    kinds = {"class_names": list, "fingerprint": str, "source": str, "train": str, "removed": int, "channels": int}
    with _undamaged(file):
        found = json.loads(file.read_text())
        if not isinstance(found, dict):
            raise ValueError("it has no settings by name")
        for name, kind in kinds.items():
            if not isinstance(found.get(name, kind()), kind) or (name not in found and name in REQUIRED):
                raise ValueError(f"it has no {name}")
        return found


@contextmanager
def _undamaged(file: Path) -> Iterator[None]:
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
    """

    train: Split
    test: Split
    class_names: list[str]
    about: dict[str, Any] = {}  # noqa: RUF012
    files: list[str] = []  # noqa: RUF012


class Source(NamedTuple):
    """Where the images of a data set come from.

    Attributes:
        store: the folder of their decoded copy.
        decode: makes them anew, all of them.
    """

    store: Path
    decode: Callable[[], Decoded]


def load(
    name: str,
    *,
    cache: Path,
    root: str = "",
    limit: int = 0,
    test_limit: int = 0,
    image_size: int = 32,
) -> Dataset:
    """Open a data set, downloading and decoding it into `cache` on first use.

    Slow work is logged, at INFO, before it begins.

    Args:
        name: `digits` (scikit-learn's, embedded), `cifar10`, `cifar100` (through torchvision), `folder`, or `random`
            (ten noisy patterns, 10,000 images for training and 1,000 for testing if no limit says otherwise: for
            measuring speed where no images are at hand).
        cache: where downloads and decoded arrays are kept.
        root: for `folder`: a tree that `torchvision.datasets.ImageFolder` reads, or an archive of one. With
            subfolders `train/` and `test/` these are the splits; otherwise every sixth image of a class is for testing.
        limit, test_limit: keep that many images, the first of each class in equal numbers; 0 keeps all.
        image_size: for `folder` and `random`: pixels a side.

    Raises:
        UserError: nothing usable is there: missing, empty, corrupt, one class, or no network and no cache.

    Example:
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     np.bincount(load("digits", cache=Path(cache), limit=50).train.labels)
        array([5, 5, 5, 5, 5, 5, 5, 5, 5, 5])
    """
    options: dict[str, Any] = {"limit": limit, "test_limit": test_limit, "image_size": image_size}
    store, decode = source_of(name, cache=cache, root=root, **options)
    if not store.is_dir():
        _write(store, decode())
    dataset = Dataset(store.resolve())
    if dataset.removed:
        log.warning("%s is without %d images of forgotten clients (docs: what stays)", store, dataset.removed)
    return dataset


def source_of(name: str, *, cache: Path, root: str, limit: int, test_limit: int, image_size: int) -> Source:
    """Find the source of a data set; the arguments and errors are those of `load`."""
    if name == "folder":
        source = _unpacked(_existing(root), cache)
        key = _folder_key(source, image_size, _listing(source))
        decode: Callable[[], Decoded]
        decode = partial(_decode_folder, source, image_size, limit, test_limit)
    elif name == "random":
        key, decode = str(image_size), partial(_decode_random, image_size, limit or 10_000, test_limit or 1_000)
    elif name == "digits":
        key, decode = "1", _decode_digits
    else:
        key, decode = "1", partial(_decode_cifar, name, cache)
    store = cache / f"{name}-{key}-{limit or 'all'}-{test_limit or 'all'}"

    def limited() -> Decoded:
        found = decode()
        return found._replace(train=first_per_class(found.train, limit), test=first_per_class(found.test, test_limit))

    return Source(store, limited)


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


def _decode_digits() -> Decoded:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    train, test = np.sort(train), np.sort(test)
    names = [str(name) for name in digits.target_names]
    return Decoded(Split(images[train], digits.target[train]), Split(images[test], digits.target[test]), names)


def _decode_random(size: int, count: int, test_count: int) -> Decoded:
    random = np.random.default_rng(0)
    patterns = random.integers(256, size=(10, size, size, 3))

    def draw(count: int) -> Split:
        labels = np.arange(count) % 10
        noise = random.normal(0, 64, (count, size, size, 3))
        return Split(np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), labels)

    return Decoded(draw(count), draw(test_count), [f"pattern {k}" for k in range(10)])


def _decode_cifar(name: str, cache: Path) -> Decoded:
    from torchvision.datasets import CIFAR10, CIFAR100

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = cache / name
    log.info("%s: looking in %s, else downloading (170 MB)", name, folder)
    try:
        train, test = (source(folder, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} could not be loaded ({error}): put a good {source.filename} into {folder}, or use images of your "
            "own with data.name=folder data.root=/path/to/images"
        ) from error
    own, held_out = (Split(part.data, np.array(part.targets)) for part in (train, test))
    return Decoded(own, held_out, list(train.classes))


def _decode_folder(source: Path, size: int, limit: int, test_limit: int) -> Decoded:
    from torchvision.datasets import ImageFolder

    try:
        if (source / "train").is_dir():
            train, test = ImageFolder(source / "train"), ImageFolder(source / "test")
            parts = [(train.samples, limit), (test.samples, test_limit)]
            if train.classes != test.classes:
                raise UserError(f"{source}/train and {source}/test have different classes")
        else:
            train = ImageFolder(source)
            is_test = _every_sixth([label for _, label in train.samples])
            parts = [
                ([sample for sample, for_test in zip(train.samples, is_test, strict=True) if for_test == wanted], most)
                for wanted, most in ((False, limit), (True, test_limit))
            ]
    except FileNotFoundError as error:
        raise UserError(f"data.root={source} is no folder of one subfolder of images a class ({error})") from error
    if len(train.classes) < 2:
        raise UserError(f"data.root={source} has one class ({train.classes[0]}): at least 2 are needed")
    if not all(samples for samples, _ in parts):
        raise UserError(
            f"data.root={source} has no images for testing: give train/ and test/, or six of a class and more"
        )
    log.info("decoding %s (once)", source)
    (train_images, files), (test_images, _) = (_read_images(samples, most, size) for samples, most in parts)
    return Decoded(train_images, test_images, train.classes, {"source": str(source), "image_size": size}, files)


def _read_images(samples: list[tuple[str, int]], limit: int, size: int) -> tuple[Split, list[str]]:
    """The images, and the files that they are from."""
    from PIL import Image

    labels = np.array([label for _, label in samples])
    positions = first_per_class(Split(np.arange(len(labels)), labels), limit).images
    images = np.empty((len(positions), size, size, 3), np.uint8)
    for image, position in zip(images, positions, strict=True):
        path = samples[position][0]
        try:
            with Image.open(path) as opened:
                image[:] = np.asarray(opened.convert("RGB").resize((size, size)))
        except OSError as error:
            raise UserError(f"{path} is not a readable image ({error})") from error
    return Split(images, labels[positions]), [samples[position][0] for position in positions]


def _every_sixth(class_of: list[int]) -> np.ndarray:
    labels = np.array(class_of)
    is_test = np.zeros(len(labels), bool)
    for k in np.unique(labels):
        is_test[np.flatnonzero(labels == k)[5::6]] = True
    return is_test


def _existing(root: str) -> Path:
    path = Path(root).expanduser()
    if not root or not path.is_absolute():
        raise UserError(f"data.root={root!r} is no absolute path: Flower runs apps from a folder of its own")
    if not path.exists():
        raise UserError(f"data.root={path} does not exist")
    return path


def _unpacked(path: Path, cache: Path) -> Path:
    """Give the folder itself, or the folder that an archive is unpacked to, once."""
    from torchvision.datasets.utils import extract_archive

    if path.is_dir():
        return path
    stat = path.stat()
    target = cache / f"unpacked-{_digest([str(path), stat.st_size, stat.st_mtime_ns])[:16]}"
    if not target.is_dir():
        log.info("unpacking %s (once)", path)
        with _new_folder(target) as folder:
            try:
                extract_archive(str(path), str(folder))
            except Exception as error:  # each archive format has errors of its own
                raise UserError(f"data.root={path} is no folder and no readable archive ({error})") from error
    return target


def _folder_key(source: Path, image_size: int, listing: Iterable[tuple]) -> str:
    return _digest([str(source), image_size, *listing])[:16]


def _listing(source: Path) -> Iterator[tuple]:
    for folder, subfolders, files in os.walk(source):
        subfolders.sort()
        for file in sorted(files):
            stat = os.stat(os.path.join(folder, file))
            yield os.path.join(folder, file), stat.st_size, stat.st_mtime_ns


def _digest(parts: list) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write(store: Path, decoded: Decoded) -> None:
    if len(decoded.class_names) < 2:
        raise UserError(f"{store.name} has fewer than 2 classes")
    arrays = _arrays(decoded.train, decoded.test)
    with _new_folder(store) as folder:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        if decoded.files:
            (folder / "train_files.json").write_text(json.dumps(decoded.files))
        meta = {"class_names": decoded.class_names, "channels": decoded.test.images.shape[-1], **decoded.about}
        (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": _fingerprint(arrays)}))


def _arrays(train: Split, test: Split) -> dict[str, np.ndarray]:
    return {
        f"{split}_{part}": np.ascontiguousarray(array, dtype)
        for split, data in (("train", train), ("test", test))
        for part, array, dtype in (("images", data.images, np.uint8), ("labels", data.labels, np.int64))
    }


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(array.data).digest() for array in arrays.values())).hexdigest()


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder that becomes `target` in one step; a process that comes second drops its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        yield folder
        try:
            os.replace(folder, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
