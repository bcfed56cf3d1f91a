"""The norms against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baton.core.errors import InternalError
from baton.engine.layers import HeadNorms
from baton.kernels import reference
from baton.kernels.table import KERNELS

pytest.importorskip("triton")

from baton.kernels.triton.norms import add_rms_norm, norm_heads, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.016, torch.float16: 0.002}
TYPES = list(TOLERANCE)


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE) for shape in shapes]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """As close as one rounding of the last bit more or less allows."""
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[expected.dtype], atol=TOLERANCE[expected.dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 16), (9, 40), (5, 768), (3, 1025), (2, 16384), (0, 64)])
def test_norms_equal_the_reference(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    x, delta, weight = tensors(dtype, (num_tokens, size), (num_tokens, size), (size,))
    before = x.clone()
    assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    total, normed = add_rms_norm(x, delta, weight, 1e-6)
    expected_total, expected_normed = reference.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed)
    assert torch.equal(x, before)


def test_eps_keeps_rows_of_zeros_finite() -> None:
    x, weight = torch.zeros(2, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    assert torch.equal(rms_norm(x, weight, 1e-6), x)


def test_rows_may_lie_apart() -> None:
    wide, other, weight = tensors(torch.bfloat16, (7, 96), (7, 200), (48,))
    x, delta = wide[:, 24:72], other[:, :48]
    assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_close(add_rms_norm(x, delta, weight, 1e-5)[1], reference.add_rms_norm(x, delta, weight, 1e-5)[1])
    assert_close(rms_norm(wide.view(7, 2, 48), weight, 1e-5), reference.rms_norm(wide.view(7, 2, 48), weight, 1e-5))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (5, 1, 80), (8, 8, 128), (2, 1, 256)])
def test_heads_are_normed_in_place(dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    packed, query, key = tensors(dtype, (6, (heads + 2 * kv_heads + 1) * size), (size,), (size,))
    # The tokens lie further apart than their heads need.
    qkv = packed[:, :-size].unflatten(1, (-1, size))
    expected = qkv.clone()
    expected[:, :heads] = reference.rms_norm(expected[:, :heads], query, 1e-6)
    expected[:, heads:-kv_heads] = reference.rms_norm(expected[:, heads:-kv_heads], key, 1e-6)
    behind = packed[:, -size:].clone()
    norm_heads(qkv, kv_heads, query, key, 1e-6)
    assert_close(qkv, expected)
    assert torch.equal(qkv[:, -kv_heads:], expected[:, -kv_heads:])
    assert torch.equal(packed[:, -size:], behind)


def test_layers_norm_their_heads_with_what_the_kernels_have() -> None:
    qkv, query, key = tensors(torch.bfloat16, (6, 8, 16), (16,), (16,))
    expected = qkv.clone()
    HeadNorms(query, key, 1e-6, KERNELS["reference"]).apply(expected, 2)
    HeadNorms(query, key, 1e-6, replace(KERNELS["reference"], rms_norm=None, norm_heads=norm_heads)).apply(qkv, 2)
    assert_close(qkv, expected)


def test_what_cannot_be_normed_is_refused() -> None:
    x, weight = torch.zeros(4, 32, device=DEVICE), torch.ones(32, device=DEVICE)
    with pytest.raises(InternalError, match=r"needs a weight of that size and type, not \[16\]"):
        rms_norm(x, weight[:16], 1e-6)
    with pytest.raises(InternalError, match="float16"):
        rms_norm(x, weight.half(), 1e-6)
    with pytest.raises(InternalError, match="contiguous"):
        rms_norm(torch.zeros(32, 4, device=DEVICE).t(), weight, 1e-6)
    with pytest.raises(InternalError, match="1 to 16384"):
        rms_norm(torch.zeros(1, 16385, device=DEVICE), torch.zeros(16385, device=DEVICE), 1e-6)
    with pytest.raises(InternalError, match="one shape"):
        add_rms_norm(x, x[:2], weight, 1e-6)
    with pytest.raises(InternalError, match="in place"):
        norm_heads(x.view(4, 1, 32), 1, weight, weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("size", [4096, 5120, 8192])
def test_norms_of_real_models(size: int) -> None:
    x, delta, weight = tensors(torch.bfloat16, (8192, size), (8192, size), (size,))
    total, normed = add_rms_norm(x, delta, weight, 1e-6)
    expected_total, expected_normed = reference.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, expected_total)
    assert_close(normed, expected_normed)
