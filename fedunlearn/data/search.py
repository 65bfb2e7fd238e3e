"""Search files for images and labels by content: in any file, at any place, in the forms that the code gives them.

Of every image some windows of consecutive values are looked for, where it has most different values. So an image is
found in arrays, databases, archives and parts of them, also where its beginning was overwritten.
"""

import bz2
import gzip
import lzma
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedunlearn.data.finder import IS_RARE, Finder, chunks
from fedunlearn.data.source_files import SourceFiles

VALUES = 32
"""Consecutive values of an image that are compared."""
PLACES = 2
"""Windows of an image: one in each half."""
DIFFERENT, CHANGES = 4, 5
"""Different values that a window must have, and changes from one to the next: black areas are in files of any kind."""
LABELS, DESCENTS = 32, 8
"""Labels that a client must have at least, and how often a smaller one must follow: sorted ones are much alike."""

BLOCK = 4 << 20
"""Bytes of images that are looked at together: what is computed of them takes about forty times as much."""

PACKED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ": lzma.open, b"BZh": bz2.open}


@dataclass
class Found:
    """What was found in one file.

    Attributes:
        images: which of the images, by their place.
        files: which of the source files, by their place.
        labels: whether a sequence of all their labels is there.
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
        labels: of them, in sequences that lie together, each [n].
        others: images that are not looked for, [M, H, W, channels]: what these have too tells nobody apart.
        files: that the images were read from.
        other_files: of the same source: what these have too tells nobody apart.

    Attributes:
        unknown: how many images have no window of their own, so that they cannot be found.
        unknown_files: the same of the files.
    """

    def __init__(
        self,
        images: np.ndarray,
        *labels: np.ndarray,
        others: np.ndarray,
        files: Sequence[Path] = (),
        other_files: Iterable[Path] = (),
    ) -> None:
        own = [*_windows_of(images)]
        finder = Finder({window.tobytes(): ("image", n) for n, window in own})
        shared = {window for rows in _pixels(others) for window, _ in finder.found_in(rows)}
        told = [(n, window) for n, window in own if window.tobytes() not in shared]
        windows = {form: ("image", n) for n, window in told for form in forms(window)}
        self._files = SourceFiles(files, other_files, _pixels(others))
        windows |= {window: ("file", n) for window, n in self._files.windows.items()}
        self.unknown, self.unknown_files = len(images) - len({n for n, _ in told}), self._files.unknown
        self._finder = Finder(windows)
        self._longest = max(map(len, windows), default=0)
        telling = [own for own in labels if len(own) >= LABELS and np.count_nonzero(np.diff(own) < 0) >= DESCENTS]
        self._labels = [own.astype(kind).tobytes() for own in telling for kind in (np.int64, np.int32, np.uint8)]

    def found_in(self, path: Path) -> Found:
        """Search a file, and what is compressed in it; `Found.unread` says where that is corrupt or encrypted.

        Raises:
            OSError: it cannot be read.
        """
        found, windows = Found(), set()
        with open(path, "rb") as file:
            beginning = file.read(8)
            file.seek(0)
            self._search(file, found, windows)
        for magic, opened in PACKED.items():
            if beginning.startswith(magic):
                with _noted(found), opened(path, "rb") as content:
                    self._search(content, found, windows)
        if beginning.startswith(b"PK\x03\x04"):
            with _noted(found), zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with _noted(found), archive.open(name) as content:
                        self._search(content, found, windows)
        found.files |= self._files.having(windows)
        return found

    def _search(self, file: Any, found: Found, windows: set[bytes]) -> None:
        """Note the images and labels that are in a file, and the windows of source files."""
        for chunk in chunks(file, overlap=max([self._longest, *map(len, self._labels)])):
            for window, (kind, number) in self._finder.found_in(chunk):
                if kind == "image":
                    found.images.add(number)
                else:
                    windows.add(window)
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
        >>> numbers = list(forms(np.array([0, 255], np.uint8)))[1:4]
        >>> [np.frombuffer(form, np.float32, offset=2).tolist() for form in numbers]
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


def _blocks(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Give images as bytes, some at a time, each block with the place of its first image."""
    step = max(1, BLOCK // max(1, images[:1].nbytes))
    for first in range(0, len(images), step):
        yield first, np.ascontiguousarray(images[first : first + step]).view(np.uint8)


def _windows_of(images: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Give the windows that tell images from others, [values], each with its image's place."""
    for first, block in _blocks(images):
        for apart, rows in _layouts(block).items():
            windows = _windows(rows, apart)
            for n, place in np.argwhere(_are_varied(windows)).tolist():
                yield first + n, windows[n, place]


def _pixels(images: np.ndarray) -> Iterator[bytes]:
    """Give the values of images in every layout, some images at a time."""
    for _, block in _blocks(images):
        for rows in _layouts(block).values():
            yield rows.tobytes()


def _layouts(images: np.ndarray) -> dict[int, np.ndarray]:
    """The images as rows of values, [N, H W channels], by how far apart neighbours of a channel are."""
    channels, values = images.shape[-1], int(np.prod(images.shape[1:]))
    last = np.ascontiguousarray(images).reshape(len(images), values)
    if channels == 1:
        return {1: last}
    return {channels: last, 1: np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), values)}


def _windows(rows: np.ndarray, apart: int) -> np.ndarray:
    """The windows that are looked for, [N, places, values]: one in each half of a row, if that is long enough."""
    halves = np.array_split(rows, PLACES, axis=1) if rows.shape[1] >= PLACES * 2 * VALUES else [rows]
    return np.stack([_telling(half, apart) for half in halves], axis=1)


def _are_varied(windows: np.ndarray) -> np.ndarray:
    """Say which windows have so many values that other numbers are not the same by chance, bool [N, places]."""
    changes = np.count_nonzero(windows[..., 1:] != windows[..., :-1], axis=-1)
    ordered = np.sort(windows, axis=-1)
    values = 1 + np.count_nonzero(ordered[..., 1:] != ordered[..., :-1], axis=-1)
    return (values >= DIFFERENT) & (changes >= CHANGES)


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
    return np.take_along_axis(rows, best[:, None] + np.arange(length), axis=1)
