"""The Merkle tree over the events of a ledger, as Certificate Transparency has it (RFC 9162, section 2.1).

Its root stands for all entries and their order. A proof of about log2(n) hashes shows that an entry is among them.
"""

import hashlib
from collections.abc import Sequence


class Tree:
    """Grows by one entry after the other; its root takes about log2(n) hashes.

    Example:
        >>> tree = Tree()
        >>> for word in ("a", "b", "c"):
        ...     tree.append(leaf(word.encode()))
        >>> tree.root() == root(tree.leaves)
        True
    """

    def __init__(self) -> None:
        self.leaves: list[bytes] = []
        self._peaks: list[bytes] = []  # of complete subtrees, the largest first, as the binary digits of the size

    def append(self, hashed: bytes) -> None:
        """Add a hashed entry."""
        self.leaves.append(hashed)
        size, peak = len(self.leaves), hashed
        while size % 2 == 0:
            peak, size = _node(self._peaks.pop(), peak), size // 2
        self._peaks.append(peak)

    def root(self) -> bytes:
        """Give the root over all entries."""
        if not self._peaks:
            return root([])
        *peaks, found = self._peaks
        for peak in reversed(peaks):
            found = _node(peak, found)
        return found


def leaf(entry: bytes) -> bytes:
    """Hash an entry."""
    return hashlib.sha256(b"\x00" + entry).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """Give the root over hashed entries; of none it is the hash of nothing."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    left = _left(len(leaves))
    return _node(root(leaves[:left]), root(leaves[left:]))


def proof(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """Give what it takes besides the entry at `place` (from 0) to compute the root, the nearest first.

    Example:
        >>> leaves = [leaf(word.encode()) for word in ("a", "b", "c")]
        >>> is_included(leaf(b"b"), 1, 3, proof(leaves, 1), root(leaves))
        True
    """
    if len(leaves) == 1:
        return []
    left = _left(len(leaves))
    if place < left:
        return [*proof(leaves[:left], place), root(leaves[left:])]
    return [*proof(leaves[left:], place - left), root(leaves[:left])]


def is_included(entry: bytes, place: int, size: int, path: Sequence[bytes], expected: bytes) -> bool:
    """Say whether a proof shows that a hashed entry is at `place` among `size` entries of that root."""
    return 0 <= place < size and _root_from(entry, place, size, list(path)) == expected


def _root_from(entry: bytes, place: int, size: int, path: list[bytes]) -> bytes | None:
    if size == 1:
        return None if path else entry
    if not path:
        return None
    left, last = _left(size), path.pop()
    if place < left:
        below = _root_from(entry, place, left, path)
        return below and _node(below, last)
    below = _root_from(entry, place - left, size - left, path)
    return below and _node(last, below)


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _left(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1
