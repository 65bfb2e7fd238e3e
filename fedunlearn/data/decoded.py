"""What is decoded of a data set, before it is written: images, their labels, and whose they are."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedunlearn.errors import UserError


class Split(NamedTuple):
    """Pair images with their labels.

    Attributes:
        images: uint8 [N, H, W, channels], or rows of a table, fp32 [N, 1, 1, features].
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
    images, labels = stored(split.images), np.ascontiguousarray(split.labels, np.int64)
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


def stored(images: np.ndarray) -> np.ndarray:
    """Give images in the type that they are stored in: fp32 for numbers of a table, else uint8."""
    return np.ascontiguousarray(images, np.float32 if images.dtype == np.float32 else np.uint8)


class Decoded(NamedTuple):
    """What is decoded of a data set.

    Attributes:
        train: images and labels to train with.
        test: those that are held out.
        class_names: K names.
        about: what the store writes down of the source, if that is a folder.
        files: that the training images were read from, if that is known.
        clients: the name of each training image's client, if the data set says so.
        test_clients: that of each test image, likewise.
    """

    train: Split
    test: Split
    class_names: list[str]
    about: dict[str, Any] = {}  # noqa: RUF012
    files: list[str] = []  # noqa: RUF012
    clients: list[str] = []  # noqa: RUF012
    test_clients: list[str] = []  # noqa: RUF012

    def first(self, limit: int, test_limit: int) -> "Decoded":
        """Keep the first examples of each class in each split, as `first_per_class` does, and whose they are."""
        train, clients = _first(self.train, self.clients, limit)
        test, test_clients = _first(self.test, self.test_clients, test_limit)
        return self._replace(train=train, test=test, clients=clients, test_clients=test_clients)


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


def _first(split: Split, owners: Sequence[str], limit: int) -> tuple[Split, list[str]]:
    places, labels = first_per_class(Split(np.arange(len(split.labels)), split.labels), limit)
    images = split.images[places] if limit else split.images
    return Split(images, labels), [owners[int(place)] for place in places] if owners else []


def those(values: Sequence[str], chosen: np.ndarray) -> list[str]:
    """Give the values that are chosen; none of none."""
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen] if values else []
