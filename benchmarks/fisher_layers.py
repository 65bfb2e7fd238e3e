"""The Triton kernel beside cuDNN's weight gradient, layer by layer: `python -m benchmarks.fisher_layers [--sweep]`.

Needs a CUDA GPU. With `--sweep` every tile that fits is tried, and the best four are printed for each layer.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

from benchmarks import timing
from fedunlearn.unlearning import fisher_triton

# (channels, filters, pixels a side, kernel, stride, how many a ResNet-18 has) at width 64
LAYERS = [
    (3, 64, 32, 3, 1, 1),
    (64, 64, 32, 3, 1, 4),
    (64, 128, 32, 3, 2, 1),
    (64, 128, 32, 1, 2, 1),
    (128, 128, 16, 3, 1, 3),
    (128, 256, 16, 3, 2, 1),
    (128, 256, 16, 1, 2, 1),
    (256, 256, 8, 3, 1, 3),
    (256, 512, 8, 3, 2, 1),
    (256, 512, 8, 1, 2, 1),
    (512, 512, 4, 3, 1, 3),
]


def main() -> None:
    """Print one table, and with `--sweep` the best tiles."""
    p = argparse.ArgumentParser("python -m benchmarks.fisher_layers", description=__doc__)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--sweep", action="store_true")
    options = p.parse_args()
    torch.backends.cudnn.benchmark = True
    rows = []
    for dtype, layer in itertools.product((torch.float32, torch.bfloat16), LAYERS):
        channels, filters, size, kernel, stride, count = layer
        activation, delta, weight = tensors(layer, options.batch, dtype)
        geometry = {"stride": (stride, stride), "padding": (kernel // 2, kernel // 2)}
        squares = partial(fisher_triton.conv_squares, activation, delta, kernel_size=(kernel, kernel), **geometry)
        gradient = partial(conv2d_weight, activation, weight.shape, delta, **geometry)
        tflop = 2 * weight.numel() * delta[:, 0].numel() / 1e12
        ours, cudnn = milliseconds(squares), milliseconds(gradient)
        name = f"{str(dtype)[6:]} {channels}->{filters} {kernel}x{kernel}/{stride} @{size} (x{count})"
        rate = f"{tflop / ours * 1000:,.0f}"
        rows.append([name, f"{ours:.4f}", rate, f"{cudnn:.4f}", f"{ours / cudnn:.2f}", f"{error(layer, dtype):.1e}"])
        if options.sweep:
            print(name, *best_tiles(squares, layer, delta), sep="\n    ", flush=True)
    columns = ("layer", "ours ms", "TFLOP/s", "cuDNN's sum ms", "ratio", "relative error")
    timing.table(f"squared weight gradients, batch {options.batch}", columns, rows)


def tensors(layer: tuple[int, ...], batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Make a random activation, gradient of the output, and weight of the layer's shape."""
    channels, filters, size, kernel, stride, _ = layer
    activation = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype)
    weight = torch.empty(filters, channels, kernel, kernel, device="cuda", dtype=dtype)
    delta = torch.randn_like(conv2d(activation, weight, None, stride, kernel // 2))
    activation, delta = (x.contiguous(memory_format=torch.channels_last) for x in (activation, delta))
    return activation, delta, weight


def error(layer: tuple[int, ...], dtype: torch.dtype) -> float:
    """Give ||S - reference|| / ||reference||, the reference in fp64."""
    _, _, _, kernel, stride, _ = layer
    activation, delta, weight = tensors(layer, 9, dtype)
    pairs = zip(activation.double().split(1), delta.double().split(1), strict=True)
    squares = [conv2d_weight(a, weight.shape, d, stride, kernel // 2).square() for a, d in pairs]
    expected = torch.stack(squares).sum(0)
    sides, padding = (kernel, kernel), (kernel // 2, kernel // 2)
    found = fisher_triton.conv_squares(activation, delta, kernel_size=sides, stride=(stride, stride), padding=padding)
    return float((found.double() - expected).norm() / expected.norm())


def best_tiles(squares: Callable[[], Tensor], layer: tuple[int, ...], delta: Tensor) -> Iterator[str]:
    """Find the four fastest tiles, and how many could not be compiled."""
    channels, filters, _, kernel, _, _ = layer
    rule, results, failed = fisher_triton.choose_tile, [], 0
    choices = itertools.product((64, 128), (64, 128), (16, 32, 64), (4, 8), (3, 4, 5))
    for tile in choices:
        block_k, block_j, block_p, warps, _ = tile
        too_large = block_k > max(64, filters) or block_j > 2 * channels * kernel**2
        if too_large or (block_k * block_j > 2**13 and warps == 4) or (block_p > 16 and delta[0, 0].numel() <= 16):
            continue
        fisher_triton.choose_tile = lambda *_, tile=tile: tile
        try:
            results.append((milliseconds(squares), tile))
        except Exception:  # what a compiler says of a tile that does not fit is of many types
            failed += 1
    fisher_triton.choose_tile = rule
    yield from (f"{ms:.4f} ms {tile}" for ms, tile in sorted(results)[:4])
    if failed:
        yield f"{failed} tiles do not fit"


def milliseconds(function: Callable[[], Tensor]) -> float:
    """Time the function: the median by events on the GPU."""
    from triton.testing import do_bench

    return cast(float, do_bench(function, warmup=10, rep=40, return_mode="median"))


if __name__ == "__main__":
    main()
