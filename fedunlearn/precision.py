"""In how many bits forward and backward passes run."""

import torch
from torch import Tensor

PRECISIONS = ("bf16", "fp32")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Bf16 autocast for `precision="bf16"`, a no-op for `"fp32"`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def at_least_fp32(values: Tensor) -> Tensor:
    """The values in fp32, or as they are where they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
