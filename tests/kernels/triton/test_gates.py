"""The gates against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from baton.core.errors import InternalError
from baton.kernels import reference

pytest.importorskip("triton")

from baton.kernels.triton.gates import GATES, TILE, gated

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.016, torch.float16: 0.002}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("activation", sorted(reference.GATES))
@pytest.mark.parametrize(("num_tokens", "inner"), [(1, 8), (7, 40), (3, TILE), (2, TILE + 64), (0, 16)])
def test_gates_equal_the_reference(dtype: torch.dtype, activation: str, num_tokens: int, inner: int) -> None:
    torch.manual_seed(0)
    gate_up = (3 * torch.randn(num_tokens, 2 * inner)).to(dtype).to(DEVICE)
    expected = reference.GATES[activation](gate_up)
    for got in (gated(activation, gate_up), GATES[activation](gate_up)):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", sorted(reference.GATES))
def test_gates_that_overflow(activation: str) -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -90.0, 0.0, -1e15, 1e15] + [2.0] * 6], device=DEVICE)
    torch.testing.assert_close(gated(activation, gate_up), reference.GATES[activation](gate_up))


def test_rows_may_lie_apart() -> None:
    gate_up = torch.randn(5, 100, device=DEVICE)[:, 10:74]
    torch.testing.assert_close(gated("silu", gate_up), reference.silu_mul(gate_up))


def test_what_has_no_halves_is_refused() -> None:
    with pytest.raises(InternalError, match="relu"):
        gated("relu", torch.zeros(2, 8))
    for wrong in (torch.zeros(2, 7), torch.zeros(8, 2).t(), torch.zeros(8)):
        with pytest.raises(InternalError, match=r"\[T, 2F\]"):
            gated("silu", wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("activation", sorted(reference.GATES))
def test_gates_of_real_models(activation: str) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(8192, 28672, dtype=torch.bfloat16, device=DEVICE)
    torch.testing.assert_close(gated(activation, gate_up), reference.GATES[activation](gate_up), rtol=0.016, atol=0.016)
