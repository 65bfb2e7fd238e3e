"""Make batches of tensors from a client's stored images: order, augmentation, scaling."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedunlearn.data.decoded import Split
from fedunlearn.nn.augment import augmented, draws
from fedunlearn.nn.model import Batch

EVALUATION_BATCH = 500
"""Images at once on a GPU where nothing is learned from them."""
FEWEST = 5
"""Examples of a last batch of its own."""


def batches(
    data: Split,
    indices: np.ndarray,
    client: int,
    *,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    crop_padding: int = 0,
    flip: bool = False,
) -> Iterator[Batch]:
    """Give the examples at `indices` once, in batches.

    With a `generator` they are shuffled and augmented: a random crop after zero-padding, and a random horizontal flip.
    The draws depend on nothing else. Without one they come in order, as they are. A last batch of fewer than five joins
    the one before it (`cuts`).

    Args:
        data: images and labels.
        indices: into `data`, [N].
        client: id that all examples get.
        batch_size: examples a batch; the last one may have fewer, or up to four more.
        device: that the batches are on.
        generator: of shuffling and augmentation, or None.
        crop_padding: pixels a side.
        flip: whether half of the images are mirrored.

    Returns:
        An iterator of `(images, class_labels, client_ids)`: fp32 [n, channels, H, W] in -1..1, in channels_last order,
        and int64 [n] twice.

    Example:
        >>> data = Split(np.zeros((5, 8, 8, 3), np.uint8), np.arange(5))
        >>> [len(images) for images, _, _ in batches(data, np.arange(5), 0, batch_size=2, device=torch.device("cpu"))]
        [2, 3]
    """
    if generator is not None:
        indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
    for chosen in np.split(indices, cuts(len(indices), batch_size)):
        images = torch.from_numpy(data.images[chosen]).to(device, non_blocking=True)
        if generator is not None:
            drawn = draws(len(images), generator, crop_padding, flip).to(device, non_blocking=True)
            images = augmented(images, drawn, crop_padding)
        labels = torch.from_numpy(data.labels[chosen]).to(device, non_blocking=True)
        yield scale(images), labels, torch.full_like(labels, client)


def evaluation_batch(batch_size: int, device: torch.device) -> int:
    """Choose how many images go at once where nothing is learned from them, so that it matters for speed alone.

    Args:
        batch_size: as in training.
        device: of the model.

    Example:
        >>> evaluation_batch(32, torch.device("cuda")), evaluation_batch(32, torch.device("cpu"))
        (500, 32)
    """
    return max(batch_size, EVALUATION_BATCH) if device.type == "cuda" else batch_size


def scale(images: Tensor) -> Tensor:
    """Scale uint8 [N, H, W, channels] to fp32 [N, channels, H, W] in -1..1, by no statistic of any client's data.

    Rows of a table, fp32 [N, 1, 1, features], keep their values.

    Example:
        >>> scale(torch.tensor([[[[0]], [[255]]]], dtype=torch.uint8)).flatten()
        tensor([-1.,  1.])
    """
    moved = images.permute(0, 3, 1, 2)
    return moved.float() / 127.5 - 1 if images.dtype == torch.uint8 else moved


def cuts(count: int, batch_size: int) -> list[int]:
    """Choose where examples are cut into batches; a last batch of fewer than five joins the one before it.

    BatchNorm cannot normalise a single example. Over two to four the variance may be almost nothing: gradients explode.

    Args:
        count: examples.
        batch_size: examples a batch.

    Returns:
        Positions between 0 and `count`, for `numpy.split`.

    Example:
        >>> cuts(10, 4), cuts(9, 4)
        ([4], [4])
        >>> cuts(37, 16), cuts(36, 16)
        ([16, 32], [16])
    """
    places = list(range(batch_size, count, batch_size))
    return places[:-1] if places and count - places[-1] < min(FEWEST, batch_size) else places
