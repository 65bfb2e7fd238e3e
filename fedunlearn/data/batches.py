"""From a client's stored images to batches of tensors: order, augmentation, scaling."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedunlearn.data.datasets import Split
from fedunlearn.nn.model import Batch


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
    for chosen in np.split(indices, cuts(len(indices), batch_size)):
        images = torch.from_numpy(data.images[chosen]).to(device, non_blocking=True)
        if generator is not None:
            drawn = draws(len(images), generator, crop_padding, flip).to(device, non_blocking=True)
            images = augmented(images, drawn, crop_padding)
        labels = torch.from_numpy(data.labels[chosen]).to(device, non_blocking=True)
        yield scale(images), labels, torch.full_like(labels, client)


def scale(images: Tensor) -> Tensor:
    """Uint8 [N, H, W, channels] -> fp32 [N, channels, H, W] in -1..1: no statistic of anybody's data is involved."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def cuts(count: int, batch_size: int) -> list[int]:
    """Where `count` examples are cut into batches, so that none has a single one (unless `count` is 1)."""
    places = list(range(batch_size, count, batch_size))
    return places[:-1] if places and count - places[-1] == 1 else places


def draws(count: int, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Top, left and whether mirrored, [3, count], for `augmented`."""
    corners = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (1, count), generator=generator) * flip
    return torch.cat([corners, mirrored])


def shifted(images: Tensor, down: int, right: int, mirrored: int) -> Tensor:
    """Uint8 [N, H, W, channels], all moved alike, zeros moving in, then mirrored or not."""
    most = max(abs(down), abs(right))
    drawn = torch.tensor([[most - down], [most - right], [mirrored]]).expand(3, len(images))
    return augmented(images, drawn, most)


def augmented(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """Uint8 [N, H, W, channels], padded with zeros, cropped to H x W at (top, left) and mirrored as drawn."""
    count, height, width, _ = images.shape
    top, left, mirrored = drawn[:, :, None]
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored.bool(), across.flip(0), across)
    example = torch.arange(count, device=images.device)[:, None, None]
    padded = pad(images, (0, 0, padding, padding, padding, padding))
    return padded[example, rows[:, :, None], columns[:, None, :]]
