"""Shift, crop and mirror stored images, by draws that are arguments."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def draws(count: int, generator: torch.Generator, padding: int, flip: bool) -> Tensor:
    """Draw where `augmented` crops each image, and whether it mirrors it.

    Args:
        count: images.
        generator: that the draws depend on; its state does not depend on `flip`.
        padding: pixels that each side is padded by; corners are drawn from 0..2 `padding`.
        flip: whether images are mirrored half the time, or never.

    Returns:
        Top, left and mirrored (0 or 1), int64 [3, count].

    Example:
        >>> draws(5, torch.Generator().manual_seed(0), padding=2, flip=False).shape
        torch.Size([3, 5])
    """
    corners = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.randint(2, (1, count), generator=generator) * flip
    return torch.cat([corners, mirrored])


def augmented(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """Pad images with zeros, crop each to its old size, and mirror it as drawn.

    Args:
        images: uint8 [N, H, W, channels]. Rows of a table, fp32, stay as they are.
        drawn: top, left and mirrored of every image, [3, N], as `draws` gives them, on the images' device.
        padding: pixels a side.

    Returns:
        New images, uint8 [N, H, W, channels].

    Example:
        >>> image = torch.tensor([[[[1], [2]], [[3], [4]]]], dtype=torch.uint8)
        >>> augmented(image, torch.tensor([[1], [1], [1]]), padding=1)[0, :, :, 0]  # in place, mirrored
        tensor([[2, 1],
                [4, 3]], dtype=torch.uint8)
    """
    if images.dtype != torch.uint8:
        return images
    count, height, width, _ = images.shape
    top, left, mirrored = drawn[:, :, None]
    across = torch.arange(width, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.where(mirrored.bool(), across.flip(0), across)
    example = torch.arange(count, device=images.device)[:, None, None]
    padded = pad(images, (0, 0, padding, padding, padding, padding))
    return padded[example, rows[:, :, None], columns[:, None, :]]


def shifted(images: Tensor, down: int, right: int, mirrored: int) -> Tensor:
    """Shift all images alike, with zeros coming in, then mirror them or not.

    Args:
        images: uint8 [N, H, W, channels].
        down, right: pixels; negative ones shift up and to the left.
        mirrored: 1 or 0.

    Returns:
        New images, uint8 [N, H, W, channels].

    Example:
        >>> image = torch.tensor([[[[1], [2]], [[3], [4]]]], dtype=torch.uint8)
        >>> shifted(image, 1, 0, 0)[0, :, :, 0]
        tensor([[0, 0],
                [1, 2]], dtype=torch.uint8)
    """
    most = max(abs(down), abs(right))
    drawn = torch.tensor([[most - down], [most - right], [mirrored]]).expand(3, len(images))
    return augmented(images, drawn, most)
