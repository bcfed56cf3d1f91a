"""The gates of an MLP on a GPU: activation(gate) * up, read once and written once, rounded where `reference` rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError

TILE = 1024  # elements of a program: 16 bytes of each half for every thread of four warps in half precision


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> silu(gate) * up [T, F]."""
    return gated("silu", gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F], gate first -> gelu(gate) * up [T, F], with the tanh form of gelu."""
    return gated("gelu_tanh", gate_up)


GATES = {"silu": silu_mul, "gelu_tanh": gelu_mul}


def gated(activation: str, gate_up: Tensor) -> Tensor:
    """gate_up [T, 2F] with contiguous rows, gate first -> [T, F]; `activation` one of `GATES`."""
    if activation not in GATES:
        raise InternalError(f"no gate is called {activation!r}; these are: {', '.join(sorted(GATES))}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise InternalError(f"gates need contiguous rows [T, 2F], not {list(gate_up.shape)} with strides {gate_up.stride()}")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        # Tokens on the first axis of the grid: the others end at 65,535.
        grid = (tokens, triton.cdiv(size, TILE))
        gate_kernel[grid](gate_up, out, size, gate_up.stride(0), activation == "silu", TILE, num_warps=4)
    return out


@triton.jit
def gate_kernel(gate_up: tl.tensor, out: tl.tensor, size: int, stride: int, is_silu: tl.constexpr, tile: tl.constexpr) -> None:
    """A piece of one token's row: gate_up [T, 2 * size], rows `stride` apart -> out [T, size]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < size
    gate = tl.load(gate_up + token * stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + token * stride + size + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    if is_silu:
        open_share = tl.sigmoid(wide).to(gate.dtype).to(tl.float32)
        active = (wide * open_share).to(gate.dtype)
    else:
        # 0.5 x (1 + tanh(z)) = x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        active = (wide * tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))).to(gate.dtype)
    tl.store(out + token * size + column, (active.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)
