"""Numbers are rounded, and matrices of bfloat16 multiplied, as torch does it: on a GPU and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def cast_kernel(x, out, size: tl.constexpr):
    place = tl.arange(0, size)
    tl.store(out + place, tl.load(x + place).to(out.dtype.element_ty))


@triton.jit
def product_kernel(x, y, out, size: tl.constexpr):
    place = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_round_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Ties, a significand that overflows into the exponent, the subnormal, and anything.
    chosen = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1.0625, 1.1875, 1.99, 7.9, 15.8, 2.0**-9, 3 * 2.0**-10, -0.0, 448.0])
    x = torch.cat((chosen, 400 * torch.randn(1024 - len(chosen)).clamp(-1, 1))).to(DEVICE)
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x, out, 1024)
    assert torch.equal(out.float(), x.to(dtype).float())
    back = torch.empty(1024, device=DEVICE)
    cast_kernel[(1,)](out, back, 1024)
    assert torch.equal(back, out.float())


def test_products_of_bfloat16_are_those_of_numbers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 16, 16).bfloat16().to(DEVICE)
    out = torch.empty(16, 16, device=DEVICE)
    product_kernel[(1,)](x, y, out, 16)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-5, atol=1e-5)
