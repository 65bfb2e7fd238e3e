"""Networks of one's own, as people write them: sound ones, and ones that no run can use."""

import torch
from torch import nn


class TinyTransformer(nn.Module):
    """Patches as tokens, a class token, positions, one block of attention with LayerNorm and a layer scale."""

    def __init__(self, channels: int = 1, image_size: int = 8, dim: int = 16, dropout: float = 0.0):
        super().__init__()
        side = image_size // 4
        self.patches = nn.Conv2d(channels, dim, 4, 4)
        self.cls_token, self.positions = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(side**2 + 1, dim)),
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.outward = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), tokens], 1) + self.positions
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, -1)
        tokens = tokens + self.gamma * self.outward(nn.functional.scaled_dot_product_attention(q, k, v))
        return (tokens + self.mlp(self.norm2(tokens)))[:, 0]


class ViewedMaps(nn.Module):
    """`view` of a map, which plain memory order alone allows; two outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(4, 3, 2), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 8, 2))

    def forward(self, images):
        maps = self.layers(images)
        return maps.view(len(images), -1), maps


def without_batch_norm(channels: int, width: int = 8) -> nn.Module:
    """Three convolutions, nothing else."""
    layers = [nn.Conv2d(channels, width, 3, 2), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 2 * width, 3), nn.Flatten())


def counted(channels: int, image_size: int, num_classes: int) -> nn.Module:
    """As many features as these numbers are together."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(channels + image_size + num_classes))


def says_nothing():
    return nn.Flatten()


def gives_text() -> nn.Module:
    return "network"  # type: ignore[return-value]


def raises() -> nn.Module:
    raise FileNotFoundError("weights.pt")


def gives_maps() -> nn.Module:
    return nn.LazyConv2d(4, 3)


def gives_few() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))


def gives_nothing_finite() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Threshold(2, torch.nan))


def mixes_examples() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False))


def in_double() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    network.register_buffer("scale", torch.ones(1, dtype=torch.float64))
    return network


def wants_larger_images() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 11), nn.Flatten())


def changes_in_place() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Hardswish(inplace=True))


def is_complex() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    network.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    return network


def keeps_words() -> nn.Module:
    class Named(nn.Flatten):
        def get_extra_state(self):
            return {"version": 2}

    return Named()


def shared() -> nn.Module:
    """One layer under two names, and two layers with one matrix."""
    layer, first, second = nn.Linear(16, 16), nn.Linear(64, 16), nn.Linear(16, 16)
    second.weight = layer.weight
    return nn.Sequential(nn.Flatten(), first, nn.Tanh(), layer, nn.Tanh(), layer, nn.Tanh(), second)


def has_idle_batch_norm() -> nn.Module:
    class Idle(nn.Flatten):
        def __init__(self):
            super().__init__()
            self.aside = nn.BatchNorm1d(4)

    return Idle()
