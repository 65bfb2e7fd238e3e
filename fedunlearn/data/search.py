"""Search files for images and labels by content: in any file, at any place, in the forms that the code gives them.

Of every image some windows of consecutive values are looked for, where it has most different values. So an image is
found in arrays, databases, archives and parts of them, also where its beginning was overwritten.
"""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

VALUES = 32
"""Consecutive values of an image that are compared."""
PLACES = 2
"""Windows of an image: one in each half."""
CHUNK = 1 << 20
"""Bytes that are read at once."""
LABELS = 32
"""Labels that a client must have at least, or other arrays would have the same."""

KEY = 8
"""Bytes by which windows are told apart before they are compared."""
IS_RARE = (np.arange(1 << 16) * 40503) % (1 << 16) < 1024
"""A choice of pairs of bytes, at random: where all windows begin with few of them, little has to be compared."""
PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}


@dataclass
class Found:
    """What was found in one file.

    Attributes:
        images: which of the images, by their place.
        files: which of the source files, by their place.
        labels: whether the sequence of all labels is there.
        unread: why not all of the file could be searched; empty where all was.
    """

    images: set[int] = field(default_factory=set)
    files: set[int] = field(default_factory=set)
    labels: bool = False
    unread: str = ""

    def __bool__(self) -> bool:
        return bool(self.images or self.files or self.labels or self.unread)


class Wanted:
    """Looks for some images, their labels, and the files that they were read from.

    Args:
        images: uint8 [N, H, W, channels], or fp32, which are looked for as the bytes that they are.
        labels: of them, [N].
        others: images that are not looked for, [M, H, W, channels]: what these have too tells nobody apart.
        files: contents of the files that the images were read from.

    Attributes:
        unknown: how many images have no window of their own, so that they cannot be found.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, *, others: np.ndarray, files: Iterable[bytes] = ()
    ) -> None:
        images, others = (np.ascontiguousarray(rows).view(np.uint8) for rows in (images, others))
        own = [
            (n, window)
            for apart, rows in _layouts(images).items()
            for n, windows in enumerate(_windows(rows, apart))
            for window in windows
        ]
        finder = _Finder({window.tobytes(): ("image", n) for n, window in own})
        shared = {window for rows in _layouts(others).values() for window, _ in finder.found_in(rows.tobytes())}
        told = [(n, window) for n, window in own if window.tobytes() not in shared]
        windows = {form: ("image", n) for n, window in told for form in forms(window)}
        for n, content in enumerate(files):
            middle = len(content) // 2
            windows[content[middle : middle + VALUES]] = ("file", n)
        self.unknown = len(images) - len({n for n, _ in told})
        self._finder = _Finder(windows)
        self._longest = max(map(len, windows), default=0)
        is_telling = (
            len(labels) >= LABELS and np.count_nonzero(np.diff(labels)) > 1
        )  # two runs are in any sorted labels
        self._labels = [labels.astype(kind).tobytes() for kind in (np.int64, np.int32, np.uint8)] if is_telling else []

    def found_in(self, path: Path) -> Found:
        """Search a file, and what is compressed in it; `Found.unread` says where that is corrupt or encrypted.

        Raises:
            OSError: it cannot be read.
        """
        found = Found()
        with open(path, "rb") as file:
            beginning = file.read(8)
            file.seek(0)
            self._search(file, found)
        for magic, opened in PACKED.items():
            if beginning.startswith(magic):
                with _noted(found), opened(path, "rb") as content:
                    self._search(content, found)
        if beginning.startswith(b"PK\x03\x04"):
            with _noted(found), zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with _noted(found), archive.open(name) as content:
                        self._search(content, found)
        return found

    def _search(self, file: Any, found: Found) -> None:
        for chunk in _chunks(file, overlap=max([self._longest, *map(len, self._labels)])):
            for _, (kind, number) in self._finder.found_in(chunk):
                (found.images if kind == "image" else found.files).add(number)
            found.labels = found.labels or any(labels in chunk for labels in self._labels)


@contextmanager
def _noted(found: Found) -> Iterator[None]:
    """Note that something packed cannot be read, and go on with the rest."""
    try:
        yield
    except Exception as error:  # each archive format has errors of its own
        found.unread = found.unread or str(error) or type(error).__name__


def forms(values: np.ndarray) -> Iterator[bytes]:
    """Give the bytes of uint8 values, and of 0..255, 0..1 and -1..1 in each floating-point format.

    Of such numbers the first bytes are left out: where the numbers are whole, they are zero in any image.

    Example:
        >>> [np.frombuffer(form, np.float32, offset=2).tolist() for form in forms(np.array([0, 255], np.uint8))][1:4]
        [[255.0], [1.0], [1.0]]
    """
    yield values.tobytes()
    for kind, left_out in ((np.float32, 2), (np.float64, 6)):
        for number in _scaled(values.astype(kind)):
            yield number.tobytes()[left_out:]
    for number in _scaled(values.astype(np.float32)):
        yield number.astype(np.float16).tobytes()[1:]
        yield _as_bfloat16(number).tobytes()[1:]


def _scaled(numbers: np.ndarray) -> Iterator[np.ndarray]:
    kind = numbers.dtype.type
    yield from (numbers, numbers / kind(255), numbers / kind(127.5) - kind(1))


def _as_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Round fp32 numbers to the nearest that fit into their upper 16 bits, ties to even; gives those bits."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def _layouts(images: np.ndarray) -> dict[int, np.ndarray]:
    """The images as rows of values, [N, H W channels], by how far apart neighbours of a channel are."""
    last = np.ascontiguousarray(images).reshape(len(images), -1)
    channels = images.shape[-1]
    first = {} if channels == 1 else {1: np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)}
    return {channels: last, **first}


def _windows(rows: np.ndarray, apart: int) -> np.ndarray:
    """The windows that are looked for, [N, places, values]: one in each half of a row, if that is long enough."""
    halves = np.array_split(rows, PLACES, axis=1) if rows.shape[1] >= PLACES * 2 * VALUES else [rows]
    return np.stack([_telling(half, apart) for half in halves], axis=1)


def _telling(rows: np.ndarray, apart: int) -> np.ndarray:
    """Of every row a window with many changes of value, if possible one whose beginning is rare; [N, values]."""
    length = min(VALUES, rows.shape[1])
    begins = rows.shape[1] - length + 1
    changes = np.zeros(rows.shape, np.int16)
    changes[:, apart:] = rows[:, apart:] != rows[:, :-apart]
    sums = np.cumsum(changes, axis=1, dtype=np.int16)
    score = sums[:, length - 1 :] - sums[:, :begins]
    beginning = rows[:, :begins] + (np.roll(rows, -1, axis=1)[:, :begins].astype(np.uint16) << 8)
    score += 16 * IS_RARE[beginning] + 16 * (rows[:, :begins] != 0)
    best = score.argmax(1)
    return np.stack([row[first : first + length] for row, first in zip(rows, best, strict=True)])


def _chunks(file: BinaryIO, overlap: int) -> Iterator[bytes]:
    """What a file has, in pieces that each begin with the end of the one before."""
    tail = b""
    while data := file.read(CHUNK):
        yield tail + data
        tail = (tail + data)[-overlap:] if overlap else b""


class _Finder:
    """Finds windows of bytes: by their first two in a table, then by the first eight, then all are compared."""

    def __init__(self, windows: dict[bytes, tuple[str, int]]) -> None:
        self._windows: dict[int, list[tuple[bytes, tuple[str, int]]]] = {}
        for window, what in windows.items():
            self._windows.setdefault(int.from_bytes(window[:KEY], "little"), []).append((window, what))
        self._keys = np.array(sorted(self._windows), np.uint64)
        self._begins = np.zeros(1 << 16, bool)
        self._begins[(self._keys & np.uint64(0xFFFF)).astype(np.int64)] = True

    def found_in(self, data: bytes) -> set[tuple[bytes, tuple[str, int]]]:
        """Give the windows that are in the data, each with what it stands for."""
        if len(data) < KEY or not len(self._keys):
            return set()
        places = []
        for first in (0, 1):
            pairs = np.frombuffer(data, "<u2", offset=first, count=(len(data) - first) // 2)
            places.append(2 * np.flatnonzero(self._begins[pairs]) + first)
        maybe = np.concatenate(places)
        maybe = maybe[maybe <= len(data) - KEY]
        keys = np.ndarray((len(data) - KEY + 1,), "<u8", data, strides=(1,))[maybe]
        nearest = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        is_wanted = self._keys[nearest] == keys
        return {
            (window, what)
            for place, key in zip(maybe[is_wanted].tolist(), keys[is_wanted].tolist(), strict=True)
            for window, what in self._windows[key]
            if data.startswith(window, place)
        }
