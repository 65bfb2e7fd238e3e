"""Sum squared per-example convolution weight gradients on a CUDA GPU, without storing any example's gradient."""
# the kernel below is in Triton's language, whose constants and ranges are not Python's:
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

PRECISIONS = ("tf32", "tf32x3", "ieee")
STORE_POSITIONS = 128
"""Positions in whose time a tile's sums are stored and read again."""


def available(device: torch.device) -> bool:
    """Tell whether `conv_squares` runs on the device: an NVIDIA GPU of compute capability 8.0 or later, with Triton.

    Example:
        >>> available(torch.device("cpu"))
        False
    """
    built = device.type == "cuda" and torch.version.cuda is not None and find_spec("triton") is not None
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def conv_squares(
    activation: Tensor,
    delta: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    input_precision: str = "tf32",
) -> Tensor:
    """Sum the squared weight gradients of each example's loss, for a convolution without groups.

    S[k, c, y, x] = sum_i (sum_p delta[i, k, p] activation[i, c, p * stride - padding + (y, x) * dilation])^2, with an
    activation of zero outside its image. Sums are in fp32, in an order that shapes and GPU fix, so that equal inputs
    give equal bits. The kernel does as many multiplications as a training step does for the weight gradient.

    Args:
        activation: input of the convolution [N, C, H, W], fp32 or bf16, in any memory format.
        delta: gradient of the sum of losses with respect to its output, [N, K, Ho, Wo], of the activation's dtype.
        kernel_size, stride, padding, dilation: (vertical, horizontal), in pixels; the padding is with zeros.
        input_precision: of fp32 factors. `tf32` cuts their mantissas to 10 bits, which makes S some 0.15 % too small;
            `tf32x3` and `ieee` keep (nearly) all 23 and are slower. Products of bf16 are exact.

    Returns:
        [K, C, *kernel_size], fp32.

    Raises:
        ValueError: tensors that fit neither each other nor the geometry, or another dtype, device or precision.
    """
    _check(activation, delta, (kernel_size, stride, padding, dilation), input_precision)
    # Copies to shared memory are asynchronous from 4 aligned bytes up, and tensor cores take fp32 from there only with
    # positions innermost: so fp32 is read as NCHW; bf16, where a tap shifts by 2 bytes, as NHWC, or it is widened.
    channels_last = activation.dtype == torch.bfloat16 and activation.shape[1] % 8 == delta.shape[1] % 8 == 0
    dtype = torch.bfloat16 if channels_last and not _interpreted() else torch.float32
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    padded = pad(activation.to(dtype), (padding[1], padding[1], padding[0], padding[0]))
    padded = padded.contiguous(memory_format=memory_format)
    delta = delta.to(dtype).contiguous(memory_format=memory_format)

    (examples, filters, height, width), (channels, *in_size) = delta.shape, padded.shape[1:]
    columns, positions = channels * kernel_size[0] * kernel_size[1], height * width
    block_k, block_j, block_p, warps, stages = choose_tile(filters, columns, positions, channels_last)
    block_x = min(1 << (width - 1).bit_length(), block_p)
    tiles = -(-filters // block_k) * -(-columns // block_j)
    processors = torch.cuda.get_device_properties(delta.device).multi_processor_count if delta.is_cuda else 1
    per_program = examples_per_program(examples, tiles, positions, processors * 8 // warps)
    squares = torch.empty(-(-examples // per_program), filters, channels, *kernel_size, device=delta.device)
    geometry = (filters, channels, *in_size, height, width, *kernel_size, *stride, *dilation)
    blocks = (block_k, block_j, block_p // block_x, block_x)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    with torch.cuda.device_of(delta):
        kernel = _compiled()[tiles, len(squares)]
        kernel(
            padded, delta, squares, examples, per_program, *geometry, *blocks, channels_last, input_precision, **options
        )
    return squares.sum(0)


def choose_tile(filters: int, columns: int, positions: int, channels_last: bool) -> tuple[int, int, int, int, int]:
    """Choose the tile of a program, for a weight [filters, columns].

    Every program keeps two tiles of fp32 in registers: the gradient of an example and the sum of squares. The most that
    8 warps can keep is 128 x 128, and 64 x 128 for 4. Large tiles save loads. With few positions the squares and the
    latency of loads weigh more: two smaller programs a multiprocessor then overlap them with products.

    Args:
        filters: output channels.
        columns: input channels times the kernel's area.
        positions: of the output, a channel.
        channels_last: whether channels are innermost in memory.

    Returns:
        Filters, columns and positions a step, warps, and stages of loads.

    Example:
        >>> choose_tile(512, 4608, 64, channels_last=False)
        (128, 128, 32, 8, 3)
    """
    few = positions <= 16
    block_k, block_j = (min(128, 1 << max(4, (size - 1).bit_length())) for size in (filters, columns))
    if few and block_k == 128:
        block_j = min(64, block_j)
    block_p = 16 if few else 64 if channels_last and positions >= 64 else 32
    return block_k, block_j, block_p, 8 if block_k * block_j == 128 * 128 else 4, 5 if few else 3


@cache
def examples_per_program(examples: int, tiles: int, positions: int, slots: int) -> int:
    """Choose how many examples a program sums, so that programs fill the GPU and few of their sums are stored.

    Args:
        examples: of the batch.
        tiles: of the weight.
        positions: of the output, a channel.
        slots: programs that run at once; as registers allow, 8 warps a multiprocessor.

    Example:
        >>> examples_per_program(128, tiles=5, positions=1024, slots=264)
        3
    """

    def time(count: int) -> int:
        waves = -(tiles * -(-examples // count) // -slots)
        return waves * (count * positions + STORE_POSITIONS)

    return min(range(examples, 0, -1), key=time)


def _check(activation: Tensor, delta: Tensor, pairs: tuple[tuple[int, int], ...], input_precision: str) -> None:
    if input_precision not in PRECISIONS:
        raise ValueError(f"input_precision={input_precision!r} is not one of {PRECISIONS}")
    if activation.dtype != delta.dtype or delta.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"activation {activation.dtype} and delta {delta.dtype} must both be fp32 or both bf16")
    if activation.device != delta.device or not (delta.is_cuda or _interpreted()):
        raise ValueError(f"activation on {activation.device} and delta on {delta.device} must be on one CUDA device")
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"kernel_size, stride, padding and dilation must be pairs, not {pairs}")
    shapes = f"activation {list(activation.shape)} and delta {list(delta.shape)}"
    if activation.dim() != 4 or delta.dim() != 4 or not activation.numel() or not delta.numel():
        raise ValueError(f"{shapes} must be of shape [N, channels, height, width]")
    by_axis = zip(activation.shape[2:], *pairs, strict=True)
    output = [(size + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, pad, dilation in by_axis]
    if len(activation) != len(delta) or list(delta.shape[2:]) != output:
        raise ValueError(f"{shapes} do not fit: the convolution gives {[len(activation), 'filters', *output]}")


@cache
def _compiled() -> Any:
    global tl  # as the kernel names it
    from triton import jit
    from triton import language as tl

    return jit(do_not_specialize=["examples", "per_program"])(_squares_kernel)


def _interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter: on the CPU too, but it cannot multiply bf16."""
    from triton import knobs

    return knobs.runtime.interpret


def _squares_kernel(
    activation,  # padded [examples, channels, in_height, in_width], channels innermost if channels_last
    delta,  # [examples, filters, height, width], likewise
    squares,  # [splits, filters, channels, kernel_y, kernel_x]
    examples, per_program,
    filters: tl.constexpr, channels: tl.constexpr, in_height: tl.constexpr, in_width: tl.constexpr,
    height: tl.constexpr, width: tl.constexpr,
    kernel_y: tl.constexpr, kernel_x: tl.constexpr, stride_y: tl.constexpr, stride_x: tl.constexpr,
    dilation_y: tl.constexpr, dilation_x: tl.constexpr,
    block_k: tl.constexpr, block_j: tl.constexpr, block_y: tl.constexpr, block_x: tl.constexpr,
    channels_last: tl.constexpr, input_precision: tl.constexpr,
):  # fmt: skip
    """Sum the squares of `per_program` examples' gradients over a tile [block_k filters, block_j columns]."""
    taps: tl.constexpr = kernel_y * kernel_x
    blocks_x: tl.constexpr = (width + block_x - 1) // block_x
    steps: tl.constexpr = blocks_x * ((height + block_y - 1) // block_y)
    whole: tl.constexpr = height % block_y == 0 and width % block_x == 0
    # distances in memory: of channels, rows and pixels of the activation, of filters and positions of delta
    a_c: tl.constexpr = 1 if channels_last else in_height * in_width
    a_x: tl.constexpr = channels if channels_last else 1
    a_y: tl.constexpr = in_width * a_x
    d_k: tl.constexpr = 1 if channels_last else height * width
    d_p: tl.constexpr = filters if channels_last else 1
    # rows and columns past the last wrap around, and are not stored
    tiles_k: tl.constexpr = (filters + block_k - 1) // block_k
    rows = tl.program_id(0) % tiles_k * block_k + tl.arange(0, block_k)
    columns = tl.program_id(0) // tiles_k * block_j + tl.arange(0, block_j)
    k, j = rows % filters, columns % (channels * taps)
    c = j % channels if channels_last else j // taps
    tap = j // channels if channels_last else j % taps
    p = tl.arange(0, block_y * block_x)
    y, x = p // block_x, p % block_x
    at_column = c * a_c + tap // kernel_x * (dilation_y * a_y) + tap % kernel_x * (dilation_x * a_x)
    if channels_last:  # in multiples of 8: what the compiler needs to know to load 16 bytes at once
        at_column = tl.max_contiguous(tl.multiple_of(at_column, 8), 8)
    in_activation = at_column[:, None] + (y * (stride_y * a_y) + x * (stride_x * a_x))[None, :]
    in_delta = (k * d_k)[:, None] + ((y * width + x) * d_p)[None, :]
    # one loop over (example, block of positions), so that loads run ahead across examples
    first = tl.program_id(1) * per_program
    last = tl.minimum(first + per_program, examples)
    gradient = tl.zeros((block_k, block_j), tl.float32)
    total = tl.zeros((block_k, block_j), tl.float32)
    for i in tl.range(first * steps, last * steps):
        example, step = tl.cast(i // steps, tl.int64), i % steps
        top, left = step // blocks_x * block_y, step % blocks_x * block_x
        a = activation + example * (channels * in_height * in_width) + (top * stride_y * a_y + left * stride_x * a_x)
        d = delta + example * (filters * height * width) + (top * width + left) * d_p
        inside = None if whole else ((top + y < height) & (left + x < width))[None, :]
        a_tile = tl.load(a + in_activation, mask=inside, other=None if whole else 0.0)
        d_tile = tl.load(d + in_delta, mask=inside, other=None if whole else 0.0)
        gradient = tl.dot(d_tile, tl.trans(a_tile), gradient, input_precision=input_precision)
        if step == steps - 1:
            total += gradient * gradient
            gradient = tl.zeros((block_k, block_j), tl.float32)

    squares += tl.cast(tl.program_id(1), tl.int64) * (filters * channels * taps)
    squares += rows[:, None] * (channels * taps) + (c * taps + tap)[None, :]
    tl.store(squares, total, mask=(rows[:, None] < filters) & (columns[None, :] < channels * taps))
