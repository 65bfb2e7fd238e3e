"""Define a small network for tables, whose rows are images of one pixel."""

from torch import nn


def mlp(features: int, *, width: int = 64, depth: int = 2) -> nn.Module:
    """Make a multi-layer perceptron that gives embeddings.

    The first layer is a BatchNorm of the features themselves. So a column in thousands and one of zeros and ones weigh
    alike, by statistics that are estimated as those of every BatchNorm layer: on the retain clients, anew after each
    request.

    Args:
        features: numbers a row, F.
        width: of each hidden layer, and of the embedding.
        depth: hidden layers.

    Returns:
        A module of [N, F, 1, 1] -> [N, width].

    Raises:
        ValueError: no feature, or no layer.

    Example:
        >>> import torch
        >>> mlp(5, width=8)(torch.zeros(3, 5, 1, 1)).shape
        torch.Size([3, 8])
    """
    if features < 1 or depth < 1:
        raise ValueError(f"features={features} and depth={depth} must both be at least 1")
    layers: list[nn.Module] = [nn.BatchNorm2d(features), nn.Flatten()]
    for before in [features, *[width] * (depth - 1)]:
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers)
