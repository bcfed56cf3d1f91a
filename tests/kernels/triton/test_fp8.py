"""Weights of 8 bits against what they stand for, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels import reference
from torch.nn import functional

pytest.importorskip("triton")

from baton.kernels.triton import fp8
from baton.kernels.triton.fp8 import Fp8Linear, kv_scales, quantize_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def widened(narrow: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What rows of 8 bits stand for, float32."""
    return narrow.float() * scales[:, None]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 100), (3, 4096), (0, 8)])
def test_rows_in_8_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, size: int) -> None:
    x = some(dtype, rows, size) * torch.tensor([10.0**i for i in range(-2, rows - 2)], dtype=dtype, device=DEVICE)[:, None]
    expected_scales = x.float().abs().amax(1) / 448
    expected = reference.convert(x, torch.float8_e4m3fn, expected_scales[:, None])
    for max_tile in (8192, 64):  # in one tile, and in several
        monkeypatch.setattr(fp8, "MAX_TILE", max_tile)
        narrow, scales = quantize_rows(x)
        torch.testing.assert_close(scales, expected_scales)
        # A quotient on the border between two numbers may go either way.
        assert float((narrow.view(torch.uint8) != expected.view(torch.uint8)).sum()) <= 1e-3 * x.numel()
        torch.testing.assert_close(widened(narrow, scales), x.float(), rtol=1 / 16, atol=float(scales.max() if rows else 0) / 512)


def test_rows_of_zeros_and_rows_that_lie_apart() -> None:
    x = torch.zeros(3, 64, device=DEVICE)
    x[1, 20] = 2.0
    narrow, scales = quantize_rows(x[:, 10:42])
    assert scales.tolist() == pytest.approx([1.0, 2.0 / 448, 1.0])
    assert torch.equal(widened(narrow, scales), x[:, 10:42])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 64), (34, 200), (70, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_that_widens_its_weights(dtype: torch.dtype, outputs: int, inputs: int, biased: bool) -> None:
    weight, bias, x = some(dtype, outputs, inputs), some(dtype, outputs) if biased else None, some(dtype, 130, inputs)
    wide = widened(*quantize_rows(weight))
    linear = Fp8Linear(weight, bias, multiplied_in_8_bits=False)
    expected = functional.linear(x.float(), wide, None if bias is None else bias.float()).to(dtype)
    for count in (0, 1, 5, 30, 130):
        got = linear(x[:count])
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected[:count], rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    gates = reference.silu_mul(expected)
    torch.testing.assert_close(linear.gated("silu", x), gates, rtol=0.05, atol=20 * TOLERANCE[dtype])
    index = torch.tensor([0, outputs - 1, 3, 3], device=DEVICE)
    assert torch.equal(linear.rows(index), wide[index].to(dtype))


def test_numbers_of_8_bits_are_widened_exactly() -> None:
    """All of them that are finite, each as the only weight of an output."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].to(DEVICE)
    weight = torch.cat((numbers[:, None], torch.full_like(numbers, 448.0)[:, None]), dim=1)
    linear = Fp8Linear(weight, None)  # the second column makes every scale 1
    one = torch.tensor([[1.0, 0.0]], device=DEVICE)
    assert torch.equal(linear(one)[0], numbers)


@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_multiplied_in_8_bits(biased: bool) -> None:
    weight, bias, x = some(torch.bfloat16, 48, 64), some(torch.bfloat16, 48) if biased else None, some(torch.bfloat16, 9, 64)
    wide, seen = widened(*quantize_rows(weight)), widened(*quantize_rows(x))
    linear = Fp8Linear(weight, bias, multiplied_in_8_bits=True)
    expected = functional.linear(seen, wide, None if bias is None else bias.float()).bfloat16()
    for count in (0, 1, 9):
        torch.testing.assert_close(linear(x[:count]), expected[:count], rtol=0.02, atol=0.05)
    # Not far from the linear that it stands in for.
    exact = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert float((linear(x).float() - exact).norm() / exact.norm()) < 0.06


def test_scales_of_a_cache_hold_twice_what_was_seen() -> None:
    kv = some(torch.bfloat16, 3, 2, 2, 4, 16, 8)
    kv[:, 1, 0, 2] = 0
    scales = kv_scales(kv)
    assert scales.shape == (2, 2, 4)
    assert float(scales[1, 0, 2]) == 1.0
    narrow = reference.convert(2 * kv, torch.float8_e4m3fn, scales[..., None, None])
    wide = reference.convert(narrow, torch.bfloat16, scales[..., None, None])
    torch.testing.assert_close(wide, 2 * kv, rtol=1 / 14, atol=0.001)


def test_what_has_no_8_bits_is_refused() -> None:
    weight = torch.zeros(16, 32, device=DEVICE)
    with pytest.raises(InternalError, match="rows of floats"):
        quantize_rows(weight.t())
    with pytest.raises(InternalError, match=r"a weight \[outputs, inputs\]"):
        Fp8Linear(torch.zeros(3, device=DEVICE), None)
    with pytest.raises(InternalError, match="a bias must be"):
        Fp8Linear(weight, weight[0])
    with pytest.raises(InternalError, match="only bfloat16"):
        Fp8Linear(weight, None, multiplied_in_8_bits=True)
    with pytest.raises(InternalError, match=r"32 torch\.float32 inputs was given torch\.float32 \[2, 31\]"):
        Fp8Linear(weight, None)(torch.zeros(2, 31, device=DEVICE))
    with pytest.raises(InternalError, match="blocks of a pool"):
        kv_scales(weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 17, 256, 2048])
def test_linears_of_real_models(tokens: int) -> None:
    weight, x = some(torch.bfloat16, 6144, 4096), some(torch.bfloat16, tokens, 4096)
    wide, seen = widened(*quantize_rows(weight)), widened(*quantize_rows(x))
    widening = Fp8Linear(weight, None, multiplied_in_8_bits=False)
    torch.testing.assert_close(widening(x).float(), x.float() @ wide.t(), rtol=0.02, atol=0.5)
    if torch.cuda.get_device_capability() >= (8, 9):
        torch.testing.assert_close(Fp8Linear(weight, None)(x).float(), seen @ wide.t(), rtol=0.02, atol=1.0)
