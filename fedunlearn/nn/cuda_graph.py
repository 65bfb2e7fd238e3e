"""Work on a GPU that is recorded once and replayed: one launch for all its kernels."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def captured(work: Callable[[], None], state: list[Tensor]) -> Callable[[], None]:
    """`work` as a CUDA graph to replay. It runs a few times before the capture, each time on the same `state`."""
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
    finally:
        gc.enable()
    return graph.replay


@contextmanager
def _fastest_algorithms() -> Iterator[None]:
    """CuDNN looks for them: worth the time where the same shapes come again and again, as in a graph."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all captures: gradients must not be accumulated on another than they were captured on."""
    return torch.cuda.Stream()
