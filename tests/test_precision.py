import pytest
import torch

from fedunlearn.nn.precision import autocast, precision_on

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"avx2": True, "amx_bf16": True}, "bf16"),
        ({"neon": True, "bf16": False}, "fp32"),
        ({"neon": True, "bf16": True}, "bf16"),
    ],
)
def test_auto_is_bf16_where_the_cpu_has_instructions_for_it(monkeypatch, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    assert precision_on(CPU, "auto") == expected
    with autocast(CPU, "auto"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if expected == "bf16" else torch.float32)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_asked_for_is_taken_whatever_the_cpu(monkeypatch, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert precision_on(CPU, precision) == precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_asks_the_gpu():
    native = torch.cuda.get_device_capability() >= (8, 0)
    assert precision_on(torch.device("cuda"), "auto") == ("bf16" if native else "fp32")
