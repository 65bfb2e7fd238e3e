"""Decode image data sets once, into uint8 arrays on disk that every process memory-maps."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedunlearn.data import unpacked
from fedunlearn.data.archives import entered, extract
from fedunlearn.data.class_folders import labelled
from fedunlearn.data.decoded import Decoded, Split, first_per_class
from fedunlearn.data.folders import KINDS, owned, revealed
from fedunlearn.data.formats import decode_medmnist, decode_npz
from fedunlearn.data.hub import decode_hub
from fedunlearn.data.images import Fit, ImageReader, Reading
from fedunlearn.data.owned import OwnedSource, removed_from
from fedunlearn.data.scaling import Window
from fedunlearn.data.store import Dataset, digest_of, folder_key, listing_of, new_folder, write
from fedunlearn.data.tables import decode_table
from fedunlearn.errors import UserError, printable

OF_FILES = ("medmnist", "npz", "hf", "table")
"""Those whose `root` is a file, or a folder of such."""

WHOSE = {
    "npz": "an array called clients says it",
    **dict.fromkeys(("hf", "table"), "data.client=COLUMN names the column that says it"),
}
"""What says who owns an example, in data sets that may say it."""

READ_BY = {
    ".npz": ("npz", "medmnist"),
    **dict.fromkeys((".csv", ".tsv"), ("table",)),
    **dict.fromkeys((".parquet", ".pq"), ("hf", "table")),
    ".arrow": ("hf",),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2"), ("folder",)),
}
"""Data sets that a file of such an ending may be."""

SAVED_AS = {
    ".npy": "save its arrays with numpy.savez, as a file for data.name=npz",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save it as a CSV file, for data.name=table"),
}
"""What becomes of files that no data set reads."""

log = logging.getLogger("fedunlearn")


class Choices(NamedTuple):
    """How images of one's own are read; each is part of the name of the decoded copy, where it is not the default.

    Attributes:
        fit, exif, window: as in `images.Reading`.
        skip_bad: whether to go on without what cannot be read.
        label, client: names of columns or features; empty finds them.
        columns: of a table, those to learn from; none takes all.
    """

    fit: Fit = "stretch"
    exif: bool = False
    window: Window = ()
    skip_bad: bool = False
    label: str = ""
    client: str = ""
    columns: tuple[str, ...] = ()

    @property
    def key(self) -> list[str]:
        """List the choices that are not the defaults."""
        chosen = self._asdict().items()
        return [f"{name}={value!r}" for name, value in chosen if value != self._field_defaults[name]]

    def reading(self, size: int) -> Reading:
        """Say how image files are read, to `size` pixels a side."""
        return Reading(size, self.fit, self.exif, self.window)


class Owners(NamedTuple):
    """Who owns which image.

    Attributes:
        kind: of the partition; `folders.KINDS` have a part of the decoded copy for each client.
        file: a table of paths and clients, for kind `file`.
        names: of the clients that take part, by number; none takes all, in the order of their names.
        classes: names of all classes, for kind `nodes`; none takes those of the images that are here.
        here: for kind `nodes`: the clients whose images are on this machine; none on the server's.
    """

    kind: str = ""
    file: str = ""
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    here: tuple[str, ...] = ()


class Source(NamedTuple):
    """Where the images of a data set come from.

    Attributes:
        store: the folder of their decoded copy.
        decode: makes them anew, all of them.
    """

    store: Path
    decode: Callable[[], Decoded]

    def open(self) -> Dataset:
        """Open the decoded copy, which is made where it is missing."""
        if not self.store.is_dir():
            write(self.store, self.decode())
        return self.opened()

    def opened(self) -> Dataset:
        """Open the decoded copy as it is."""
        return Dataset(self.store.resolve())

    def in_memory(self) -> Dataset:
        """Decode everything anew, and write nothing."""
        return Dataset.in_memory(self.decode())


def load(
    name: str,
    *,
    cache: Path,
    root: str = "",
    limit: int = 0,
    test_limit: int = 0,
    image_size: int = 32,
    choices: Choices = Choices(),  # noqa: B008
    owners: Owners = Owners(),  # noqa: B008
) -> Dataset:
    """Open a data set, downloading and decoding it into `cache` on first use.

    Slow work is logged, at INFO, before it begins.

    Args:
        name: `digits` (scikit-learn's, embedded), `cifar10`, `cifar100` (through torchvision), `folder`, `medmnist`,
            `npz`, `hf` (of Hugging Face), `table`, or `random` (ten noisy patterns, 10,000 images for training and
            1,000 for testing if no limit says otherwise: for measuring speed where no images are at hand).
        cache: where downloads and decoded arrays are kept.
        root: for `folder`: a folder of one subfolder of images a class, or an archive of one. With
            subfolders `train/` and `test/` these are the splits; otherwise every sixth image of a class is for testing.
            For those of `OF_FILES`: a file, or a folder of such.
        limit, test_limit: keep that many images, the first of each class in equal numbers; 0 keeps all.
        image_size: for `folder`, `hf` and `random`: pixels a side.
        choices: for images of one's own.
        owners: who owns which image, where somebody says that.

    Raises:
        UserError: nothing usable is there: missing, empty, corrupt, one class, or no network and no cache.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     np.bincount(load("digits", cache=Path(cache), limit=50).train.labels)
        array([5, 5, 5, 5, 5, 5, 5, 5, 5, 5])
    """
    options: dict[str, Any] = {"limit": limit, "test_limit": test_limit, "image_size": image_size, "choices": choices}
    return source_of(name, cache=cache, root=root, owners=owners, **options).open()


def source_of(
    name: str,
    *,
    cache: Path,
    root: str,
    limit: int,
    test_limit: int,
    image_size: int,
    choices: Choices = Choices(),  # noqa: B008
    owners: Owners = Owners(),  # noqa: B008
) -> Source | OwnedSource:
    """Find the source of a data set; the arguments and errors are those of `load`."""
    decode: Callable[[], Decoded]
    if owners.kind in KINDS:
        if name != "folder":
            raise UserError(f"partition.kind={owners.kind} is for image files: data.name=folder, not {name}")
        source = _unpacked(_existing(root, name), cache, owners.file)
        options = [image_size, limit, test_limit, *choices.key]
        found = owned(source, owners.kind, owners.file, owners.here, removed_from(source, cache))
        store = cache / f"owners-{digest_of([str(source), owners.kind, owners.file, *options])[:16]}"
        names, reading = list(owners.names or found.images), choices.reading(image_size)
        decoded = OwnedSource(store, found, names, reading, limit, test_limit, choices.skip_bad, owners.classes)
        return replace(decoded, clients=revealed(names, [*found.images, *decoded.removed()]))
    if name == "folder":
        source = entered(_unpacked(_existing(root, name), cache))
        key = folder_key(source, image_size, [*listing_of(source), *choices.key])
        decode = partial(_decode_folder, source, image_size, limit, test_limit, choices)
    elif name in OF_FILES:
        source = _existing(root, name)
        key = folder_key(source, image_size, [*listing_of(source, all_files=True), *choices.key])
        decode = partial(_decode_file, name, source, choices, image_size, limit, test_limit)
    elif name == "random":
        key, decode = str(image_size), partial(_decode_random, image_size, limit or 10_000, test_limit or 1_000)
    elif name == "digits":
        key, decode = "1", _decode_digits
    else:
        key, decode = "1", partial(_decode_cifar, name, cache)
    store = cache / f"{name}-{key}-{limit or 'all'}-{test_limit or 'all'}"

    def limited() -> Decoded:
        found = decode()
        for what, split in {"training": found.train, "testing": found.test}.items():
            if not len(split.labels):
                raise UserError(f"data.name={name}: {printable(root)} has no example for {what} that can be read")
        return found.first(limit, test_limit)

    return Source(store, limited)


def clients_of(name: str, *, owners: Owners, **options: Any) -> list[str]:
    """Name all owners of the images of a data set, in the order of their names; the arguments are those of `load`.

    Raises:
        UserError: the data set does not say whose its images are.
    """
    of_all = owners._replace(names=())
    if owners.kind in KINDS:
        source = source_of(name, owners=of_all, **options)
        assert isinstance(source, OwnedSource)
        return list(source.clients)
    if clients := load(name, owners=of_all, **options).clients:
        return clients
    way = WHOSE.get(name, "partition.kind=folders and partition.file say it of image files, data.name=folder")
    raise UserError(f"partition.kind={owners.kind}: data.name={name} does not say whose its images are; {way}")


def classes_here(name: str, **options: Any) -> list[str]:
    """Name the classes of the image files on this machine; the arguments are those of `load`."""
    source = source_of(name, **options)
    assert isinstance(source, OwnedSource)
    return sorted({image.label for images in (source.owned.common, *source.owned.images.values()) for image in images})


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


def _decode_folder(source: Path, size: int, limit: int, test_limit: int, choices: Choices) -> Decoded:
    about = {"source": str(source), "image_size": size, "choices": choices.key}
    found = labelled(source)
    parts = [(found.train, limit), (found.test, test_limit)]
    if not all(samples for samples, _ in parts):
        raise UserError(
            f"data.root={printable(str(source))} has no images for testing: give train/ and test/, or six of a class "
            "and more"
        )
    log.info("decoding %s (once)", printable(str(source)))
    total = sum(min(most, len(samples)) if most else len(samples) for samples, most in parts)
    reader = ImageReader(choices.reading(size), total=total)
    (train_images, files), (test_images, _) = (_read_images(samples, most, reader) for samples, most in parts)
    reader.conclude(skip_bad=choices.skip_bad)
    return Decoded(train_images, test_images, found.classes, about, files)


def _read_images(samples: list[tuple[str, int]], limit: int, reader: ImageReader) -> tuple[Split, list[str]]:
    """The images that can be read, and the files that they are from."""
    labels = np.array([label for _, label in samples])
    positions = first_per_class(Split(np.arange(len(labels)), labels), limit).images
    images, is_good = reader.read((samples[position][0] for position in positions), len(positions))
    positions = positions[is_good]
    return Split(images, labels[positions]), [samples[position][0] for position in positions]


def _existing(root: str, name: str) -> Path:
    """Give the path of a data set.

    Raises:
        UserError: it is not absolute, nothing is there, or its ending says that it is another data set.
    """
    path = Path(root).expanduser()
    if not root or not path.is_absolute():
        raise UserError(f"data.root={root!r} is no absolute path: Flower runs apps from a folder of its own")
    if not path.exists():
        raise UserError(f"data.root={printable(str(path))} does not exist")
    ending, where = path.suffix.lower(), f"data.root={printable(str(path))}"
    if path.is_file() and ending in SAVED_AS:
        raise UserError(f"{where} is not read as data.name={name}: {SAVED_AS[ending]}")
    if path.is_file() and name not in READ_BY.get(ending, (name,)):
        raise UserError(f"{where} is read as data.name={' or data.name='.join(READ_BY[ending])}, not as {name}")
    return path


def _unpacked(path: Path, cache: Path, beside: str = "") -> Path:
    """Give the folder itself, or the folder that an archive is unpacked to, once; `beside` as in `entered`."""
    if path.is_dir():
        return path
    target = unpacked_to(path, cache)
    if not target.is_dir():
        log.info("unpacking %s (once)", printable(str(path)))
        with new_folder(target) as folder:
            extract(path, folder)
            unpacked.delete_again(target, folder)
    unpacked.note_archive(target, path)
    return entered(target, beside)


def unpacked_to(archive: Path, cache: Path) -> Path:
    """Say to which folder an archive is unpacked: to another one when it has changed."""
    stat = archive.stat()
    return cache / f"{unpacked.PREFIX}{digest_of([str(archive), stat.st_size, stat.st_mtime_ns])[:16]}"


def unpacked_of(name: str, *, cache: Path, root: str, **options: Any) -> Path | None:
    """Give the folder that an archive of images is unpacked to; None for other sources."""
    path = _existing(root, name) if name == "folder" else None
    return unpacked_to(path, cache) if path and not path.is_dir() else None


def _decode_file(name: str, source: Path, choices: Choices, size: int, limit: int, test_limit: int) -> Decoded:
    if name == "medmnist":
        return decode_medmnist(source)
    if name == "npz":
        return decode_npz(source, choices.window)
    columns = {"label": choices.label, "client": choices.client, "skip_bad": choices.skip_bad}
    if name == "table":
        return decode_table(source, columns=choices.columns, **columns)
    return decode_hub(source, choices.reading(size), limit=limit, test_limit=test_limit, **columns)
