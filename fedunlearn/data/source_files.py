"""Tell the files of one owner from all others, by windows of bytes that only one of them has.

Files of one kind share much: headers, tables, colour profiles, black borders. Such bytes tell nobody apart. So windows
lie where bytes vary, behind the tables of known formats, and none of them is in any other file.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedunlearn.data.finder import IS_RARE, Finder, chunks

LENGTH = 64
"""Bytes of a window."""
PLACES = 8
"""Windows of a file, at most: one in each part of it."""
VARIED = 12
"""Different bytes, and different steps from byte to byte, that a window must have."""
PERIODS = (1, 2, 3, 4)
"""Bytes of a pixel: where each byte is that of the pixel before, a picture is of one colour."""


class SourceFiles:
    """Knows some files by windows of bytes that nothing else has.

    Args:
        files: that are looked for, all of them somebody's; one that cannot be read is not known.
        others: further files, none of which may be taken for one of these.
        pixels: of further images as they are decoded, for the same.

    Attributes:
        windows: each with the place in `files` of the first file that has it.
        unknown: how many files have no such window.
    """

    def __init__(self, files: Sequence[Path], others: Iterable[Path], pixels: Iterable[bytes] = ()) -> None:
        own = [windows_of(_content(path)) for path in files]
        candidates = {window: place for place in reversed(range(len(own))) for window in own[place]}
        finder = Finder({window: ("file", place) for window, place in candidates.items()})
        shared = {window for data in (_tables(), *pixels) for window, _ in finder.found_in(data)}
        for path in others:
            shared |= {window for window, _ in _found_in(path, finder)}
        self.windows = {window: place for window, place in candidates.items() if window not in shared}
        self._counts = Counter(self.windows.values())
        self.unknown = sum(not windows & self.windows.keys() for windows in own)

    def having(self, windows: Collection[bytes]) -> set[int]:
        """Say which files have left at least half of their windows: fewer may be what another file has too."""
        found = Counter(self.windows[window] for window in windows)
        return {place for place, count in found.items() if 2 * count >= self._counts[place]}


def windows_of(content: bytes) -> set[bytes]:
    """Give a window from each part of a file, from where its bytes vary most; none from parts where they hardly do.

    Example:
        >>> windows_of(bytes(5000)), windows_of(bytes(range(256)) * 9)
        (set(), set())
        >>> len(windows_of(np.random.default_rng(0).bytes(5000)))
        8
    """
    data = np.frombuffer(content, np.uint8)[_beginning(content) :]
    starts = len(data) - LENGTH + 1
    if starts < 1:
        return set()
    edges = np.linspace(0, starts, min(PLACES, -(-starts // LENGTH)) + 1).astype(int)
    best = [_most_varied(data[low : high + LENGTH - 1]) for low, high in pairwise(edges)]
    return {window.tobytes() for window in best if is_varied(window)}


def _beginning(content: bytes) -> int:
    """Say where a picture begins behind its tables, in formats that have such; else 0."""
    place = 0
    if content.startswith(b"\xff\xd8"):  # JPEG: a row of segments, until that of the scan
        place = 2
        while content[place : place + 1] == b"\xff" and content[place : place + 2] != b"\xff\xda":
            place += 2 + int.from_bytes(content[place + 2 : place + 4])
    elif content.startswith(b"\x89PNG"):
        place = content.find(b"IDAT")
    elif content.startswith(b"BM"):
        place = int.from_bytes(content[10:14], "little")
    return place if 0 < place < len(content) else 0


def _most_varied(data: np.ndarray) -> np.ndarray:
    """Give the window in which most bytes are others than those before, if possible one whose beginning is rare."""
    changes = np.zeros(len(data), np.int32)
    longest = max(PERIODS)
    changes[longest:] = np.logical_and.reduce(
        [data[longest:] != data[longest - period : len(data) - period] for period in PERIODS]
    )
    sums = np.concatenate([[0], np.cumsum(changes)])
    score = sums[LENGTH:] - sums[:-LENGTH]
    pairs = data[:-1].astype(np.uint16) + (data[1:].astype(np.uint16) << 8)
    start = int((score + 16 * IS_RARE[pairs[: len(score)]]).argmax())
    return data[start : start + LENGTH]


def is_varied(window: np.ndarray) -> bool:
    """Say whether a window has many different bytes, and many different steps between them."""
    return min(len(np.unique(window)), len(np.unique(np.diff(window)))) >= VARIED


@cache
def _tables() -> bytes:
    """Give a JPEG of one pixel: it has the standard tables, as many pictures within other files do too."""
    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (1, 1)).save(file, "JPEG")
    return file.getvalue()


def _found_in(path: Path, finder: Finder) -> set[tuple[bytes, tuple[str, int]]]:
    """The windows that are in a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return {found for chunk in chunks(file, overlap=LENGTH) for found in finder.found_in(chunk)}
    except OSError:
        return set()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
