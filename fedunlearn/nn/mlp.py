"""Define a small network for tables, whose rows are images of one pixel."""

from torch import nn


def mlp(channels: int, *, width: int = 64, depth: int = 2) -> nn.Module:
    """Make a multi-layer perceptron that gives embeddings.

    The first layer is a BatchNorm of the features themselves. So a column in thousands and one of zeros and ones weigh
    alike, by statistics that are estimated as those of every BatchNorm layer: on the retain clients, anew after each
    request.

    Args:
        channels: numbers a row, F.
        width: of each hidden layer, and of the embedding.
        depth: hidden layers.

    Returns:
        A module of [N, F, 1, 1] -> [N, width].

    Raises:
        ValueError: no number, or no layer.

    Example:
        >>> import torch
        >>> mlp(5, width=8)(torch.zeros(3, 5, 1, 1)).shape
        torch.Size([3, 8])
    """
    if channels < 1 or depth < 1:
        raise ValueError(f"channels={channels} and depth={depth} must both be at least 1")
    layers: list[nn.Module] = [nn.BatchNorm2d(channels), nn.Flatten()]
    for before in [channels, *[width] * (depth - 1)]:
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers)
