"""Measures how near training comes to what the machine's matrix units can do."""

import time
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedunlearn.nn.precision import precision_on


@lru_cache
def matrix_rate(device: torch.device, precision: str) -> float:
    """Measure floating-point operations a second of square matrix products, the best of a few."""
    on_gpu = device.type == "cuda"
    size, repeats = (8192, 20) if on_gpu else (1024, 3)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, generator=generator)
    a = a.bfloat16() if precision_on(device, precision) == "bf16" else a
    seconds = []
    for _ in range(3):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, a)
        _wait(device)
        seconds.append((time.perf_counter() - started) / repeats)
    return 2 * size**3 / min(seconds)


def training_operations(model: nn.Module, image: torch.Tensor) -> float:
    """Count floating-point operations of one image's forward and backward pass, on two images of that shape."""
    with FlopCounterMode(display=False) as counter:
        class_logits, client_logits, _ = model.train()(image.expand(2, *image.shape).clone())
        loss = class_logits.float().sum()
        if client_logits is not None:
            loss = loss + client_logits.float().sum()
        loss.backward()
    return counter.get_total_flops() / 2


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
