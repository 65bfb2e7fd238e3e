"""From a client's stored images to batches of tensors: order, augmentation, scaling."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedunlearn.datasets import Split
from fedunlearn.model import Batch


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
    """The examples `indices` of `data`, once: `(images [N, channels, H, W] in -1..1, class_labels, client_ids)`.

    With a `generator` they are shuffled and augmented (random crop after zero-padding, random horizontal flip), and
    the draws depend on nothing else; without one they come in order, as they are. No batch has a single example
    (which BatchNorm could not normalise) unless `indices` has. Images are in channels_last order.
    """
    if generator is not None:
        indices = indices[torch.randperm(len(indices), generator=generator).numpy()]
    for chosen in np.split(indices, _cuts(len(indices), batch_size)):
        images = data.images[chosen]
        if generator is not None:
            images = _augment(images, generator, crop_padding, flip)
        labels = torch.from_numpy(data.labels[chosen]).to(device)
        yield scale(images, device), labels, torch.full_like(labels, client)


def scale(images: np.ndarray, device: torch.device) -> Tensor:
    """Uint8 [N, H, W, channels] -> fp32 [N, channels, H, W] in -1..1: no statistic of anybody's data is involved."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _cuts(count: int, batch_size: int) -> list[int]:
    cuts = list(range(batch_size, count, batch_size))
    return cuts[:-1] if cuts and count - cuts[-1] == 1 else cuts


def _augment(images: np.ndarray, generator: torch.Generator, padding: int, flip: bool) -> np.ndarray:
    count, height, width, _ = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).numpy()
    mirrored = torch.randint(2, (count,), generator=generator).bool().numpy() & flip
    rows = top[:, None] + np.arange(height)
    columns = left[:, None] + np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
