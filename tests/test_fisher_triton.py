import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_weight

from fedunlearn.unlearning import fisher_triton
from fedunlearn.unlearning.fisher_triton import available, choose_tile, conv_squares, examples_per_program

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not available(torch.device("cuda")), reason="no CUDA GPU that Triton compiles for"
)


class Case(NamedTuple):
    examples: int
    channels: int
    filters: int
    size: tuple[int, int]
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    layout: torch.memory_format = torch.contiguous_format

    @property
    def geometry(self):
        pairs = {"kernel_size": self.kernel, "stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return {name: (value, value) for name, value in pairs.items()}

    def tensors(self, dtype):
        """An activation and the gradient of the output, in any memory format."""
        g = torch.Generator().manual_seed(0)
        activation = torch.randn(self.examples, self.channels, *self.size, generator=g).to(dtype)
        weight = torch.zeros(self.filters, self.channels, self.kernel, self.kernel, dtype=dtype)
        output = conv2d(activation, weight, None, self.stride, self.padding, self.dilation)
        delta = torch.randn(output.shape, generator=g).to(dtype)
        return activation.contiguous(memory_format=self.layout), delta.contiguous(memory_format=self.layout)

    def error(self, dtype, device="cpu", input_precision="ieee"):
        """‖out - ref‖ / ‖ref‖, the reference being one weight gradient an example in fp64."""
        activation, delta = self.tensors(dtype)
        shape = (self.filters, self.channels, self.kernel, self.kernel)
        expected = torch.zeros(shape, dtype=torch.float64)
        for a, d in zip(activation.double().split(1), delta.double().split(1), strict=True):
            expected += conv2d_weight(a, shape, d, self.stride, self.padding, self.dilation).square()
        result = conv_squares(
            activation.to(device), delta.to(device), **self.geometry, input_precision=input_precision
        ).cpu()
        assert result.dtype == torch.float32
        assert result.shape == shape
        return float((result.double() - expected).norm() / expected.norm())


CASES = {
    "whole blocks": Case(5, 8, 16, (8, 8)),
    "one position": Case(3, 8, 8, (1, 1)),
    "16 positions": Case(5, 16, 128, (4, 4)),
    "4 tiles": Case(2, 17, 136, (6, 6)),
    "stem": Case(5, 3, 20, (13, 13)),
    "stride 2, odd sizes": Case(5, 10, 24, (13, 9), stride=2),
    "shortcut": Case(3, 16, 24, (9, 9), kernel=1, stride=2, padding=0),
    "no padding": Case(2, 5, 7, (7, 12), padding=0),
    "wide and dilated": Case(2, 8, 8, (5, 70), padding=2, dilation=2),
    "channels last": Case(3, 16, 8, (8, 6), layout=torch.channels_last),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def interpret():
    """Prints every case's error in Triton's interpreter, or why it runs none."""
    try:
        report = {dtype: {name: case.error(DTYPES[dtype]) for name, case in CASES.items()} for dtype in DTYPES}
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        report = "the interpreter of this Triton runs no loops with this NumPy"
    print(json.dumps(report))


@pytest.fixture(scope="module")
def interpreted():
    # the interpreter is chosen as Triton is imported, so it takes a process of its own
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    if isinstance(report, str):
        pytest.skip(report)
    return report


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_gradient_an_example(interpreted, name, dtype):
    assert interpreted[dtype][name] < 1e-5


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"), [("fp32", "ieee", 1e-5), ("fp32", "tf32", 2e-3), ("bf16", "tf32", 1e-4)]
)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_gradient_an_example_on_a_gpu(name, dtype, precision, tolerance):
    assert CASES[name].error(DTYPES[dtype], "cuda", precision) < tolerance


@needs_gpu
def test_gives_equal_bits_on_a_gpu():
    activation, delta = (x.cuda() for x in Case(37, 64, 64, (32, 32)).tensors(torch.float32))
    first, second = (conv_squares(activation, delta, kernel_size=(3, 3), padding=(1, 1)) for _ in range(2))
    assert torch.equal(first, second)


def test_runs_on_gpus_only():
    assert not available(torch.device("cpu"))


def test_programs_fill_the_gpu_and_large_weights_are_not_split():
    assert examples_per_program(128, tiles=5, positions=1024, slots=264) == 3  # 5 * 43 programs
    assert examples_per_program(128, tiles=50 * 264, positions=16, slots=264) == 128
    assert examples_per_program(5, tiles=1, positions=64, slots=2) == 3


@pytest.mark.parametrize("positions", [1, 16, 17, 64, 1024])
@pytest.mark.parametrize("columns", [3, 27, 576, 4608])
@pytest.mark.parametrize("filters", [1, 64, 512])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_tile_fits_registers_and_tensor_cores(filters, columns, positions, channels_last):
    block_k, block_j, block_p, warps, _ = choose_tile(filters, columns, positions, channels_last)
    assert min(block_k, block_j, block_p) >= 16
    assert 2 * block_k * block_j <= 128 * 32 * warps  # 128 registers a thread


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_precision": "tf16"}, "input_precision='tf16'"),
        ({"delta": torch.zeros(2, 5, 4, 4, dtype=torch.float64)}, "both be fp32 or both bf16"),
        ({"delta": torch.zeros(2, 5, 4, 4, device="meta")}, "on one CUDA device"),
        ({"padding": "same"}, "must be pairs"),
        ({"delta": torch.zeros(2, 5, 16)}, "must be of shape"),
        ({"delta": torch.zeros(0, 5, 4, 4), "activation": torch.zeros(0, 3, 4, 4)}, "must be of shape"),
        ({"delta": torch.zeros(3, 5, 4, 4)}, r"the convolution gives \[2, 'filters', 4, 4\]"),
        ({"stride": (2, 2)}, r"the convolution gives \[2, 'filters', 2, 2\]"),
    ],
)
def test_refuses_what_does_not_fit(monkeypatch, change, message):
    monkeypatch.setattr(fisher_triton, "_interpreted", lambda: True)
    arguments = {"activation": torch.zeros(2, 3, 4, 4), "delta": torch.zeros(2, 5, 4, 4), "kernel_size": (3, 3)}
    with pytest.raises(ValueError, match=message):
        conv_squares(**(arguments | {"padding": (1, 1)} | change))


if __name__ == "__main__":
    interpret()
