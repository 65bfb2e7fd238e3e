"""Choose in how many bits forward and backward passes run."""

import torch
from torch import Tensor

PRECISIONS = ("bf16", "fp32")
PASSES = ("auto", *PRECISIONS)
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names of CPU capabilities, of x86 and of ARM, each enough for bf16."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Open bf16 autocast where the precision on the device is bf16, and nothing for fp32.

    Args:
        device: that the passes run on.
        precision: one of `PASSES`.

    Example:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(device, precision) == "bf16")


def precision_on(device: torch.device, precision: str) -> str:
    """Resolve `auto` to `bf16` where the device has instructions for it, else to `fp32`.

    A device without them emulates bf16, which takes several times as long as fp32.

    Args:
        device: that the passes run on.
        precision: one of `PASSES`; whatever is not `auto` comes back unchanged.

    Returns:
        `bf16` or `fp32`.

    Example:
        >>> precision_on(torch.device("cpu"), "fp32")
        'fp32'
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = any(torch.cpu.get_capabilities().get(name, False) for name in BF16_INSTRUCTIONS)
    return "bf16" if has_bf16 else "fp32"


def at_least_fp32(values: Tensor) -> Tensor:
    """Widen values to fp32; wider ones stay as they are.

    Example:
        >>> at_least_fp32(torch.ones(1, dtype=torch.bfloat16)).dtype, at_least_fp32(torch.ones(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return values.to(torch.promote_types(values.dtype, torch.float32))
