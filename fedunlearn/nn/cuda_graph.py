"""Record work on a GPU once and replay it, with one launch for all its kernels."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class NotCapturedError(Exception):
    """The work does what no graph can hold, as waiting for a value."""


def captured(work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Capture `work` as a CUDA graph, and return what replays it.

    `work` runs three times before the capture, each time on the same `state`. The state is as before afterwards, that
    of random draws included.

    Args:
        work: reads and writes tensors that stay where they are.
        state: every tensor that `work` changes and reads again.

    Returns:
        A function without arguments that does `work` once.

    Raises:
        NotCapturedError: `work` runs, but not while it is recorded.

    Example:
        >>> if torch.cuda.is_available():
        ...     counter = torch.zeros((), device="cuda")
        ...     replay = captured(lambda: counter.add_(1), [counter])
        ...     replay()
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()]):
        return _captured(work, state)


def _captured(work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    kept, stream, graph = [tensor.clone() for tensor in state], _side_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream), _fastest_algorithms(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # Adam, not yet
            for _ in range(3):
                work()
                for tensor, before in zip(state, kept, strict=True):
                    tensor.copy_(before)
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    gc.collect()  # graphs that nobody needs any more: one that is freed during a capture spoils it
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream), _fastest_algorithms():
            work()
    except RuntimeError as error:
        raise NotCapturedError(str(error).splitlines()[0]) from error
    finally:
        gc.enable()
    return graph.replay


@contextmanager
def _fastest_algorithms() -> Iterator[None]:
    """Let CuDNN look for the fastest algorithms, which pays where the same shapes come again and again."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@cache
def _side_stream() -> torch.cuda.Stream:
    """Make one stream for all captures: gradients must accumulate on the stream that they were captured on."""
    return torch.cuda.Stream()
