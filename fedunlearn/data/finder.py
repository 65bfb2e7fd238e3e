"""Find any of many windows of bytes in files, wherever they lie."""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 20
"""Bytes that are read at once."""
KEY = 8
"""Bytes by which windows are told apart before they are compared."""
IS_RARE = (np.arange(1 << 16) * 40503) % (1 << 16) < 1024
"""A choice of pairs of bytes, at random: where all windows begin with few of them, little has to be compared."""


def chunks(file: BinaryIO, overlap: int) -> Iterator[bytes]:
    """Give what a file has, in pieces that each begin with the end of the one before."""
    tail = b""
    while data := file.read(CHUNK):
        yield tail + data
        tail = (tail + data)[-overlap:] if overlap else b""


class Finder:
    """Finds windows of bytes: by their first two in a table, then by the first eight, then all are compared.

    Args:
        windows: each with what it stands for.
    """

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
