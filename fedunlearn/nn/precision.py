"""In how many bits forward and backward passes run."""

import torch
from torch import Tensor

PRECISIONS = ("bf16", "fp32")
PASSES = ("auto", *PRECISIONS)
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and ARM CPUs


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Bf16 autocast where `precision_on` the device is `"bf16"`, a no-op for `"fp32"`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_on(device, precision) == "bf16")


def precision_on(device: torch.device, precision: str) -> str:
    """The precision; for `"auto"` `bf16` where the device has instructions for it, else `fp32`.

    Without them bf16 is emulated, and takes several times as long as fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = any(torch.cpu.get_capabilities().get(name, False) for name in BF16_INSTRUCTIONS)
    return "bf16" if has_bf16 else "fp32"


def at_least_fp32(values: Tensor) -> Tensor:
    """The values in fp32, or as they are where they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
