"""One array of several pieces, each of which is opened when it is needed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Joined:
    """Read rows of an array that lies in several pieces; a piece is opened when a row of it is asked for.

    Args:
        lengths: rows of each piece.
        open_piece: gives a piece by its number.
        shape: of a row.
        dtype: of all of them.

    Example:
        >>> pieces = [np.array([1, 2]), np.array([3])]
        >>> joined = Joined([2, 1], pieces.__getitem__, (), np.int64)
        >>> joined[np.array([2, 0])], joined[1:], len(joined)
        (array([3, 1]), array([2, 3]), 3)
    """

    def __init__(
        self, lengths: Sequence[int], open_piece: Callable[[int], np.ndarray], shape: tuple[int, ...], dtype: Any
    ) -> None:
        self._ends, self._open, self.dtype = np.cumsum([0, *lengths]), open_piece, np.dtype(dtype)
        self.shape = (int(self._ends[-1]), *shape)
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> np.ndarray:
        is_places = isinstance(chosen, np.ndarray) and chosen.dtype.kind in "iu"
        places = chosen if is_places and (chosen >= 0).all() else np.arange(len(self))[chosen]
        if not np.ndim(places):
            return self[np.array([places])][0]
        pieces = np.searchsorted(self._ends, places, side="right") - 1
        rows = np.empty((len(places), *self.shape[1:]), self.dtype)
        for piece in np.unique(pieces):
            here = pieces == piece
            rows[here] = self._open(int(piece))[places[here] - self._ends[piece]]
        return rows

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)
