"""RMSNorm on a GPU, one pass over memory: alone, behind the addition of the residual, and of query and key heads.

Sums are in float32; results are rounded exactly where `reference.rms_norm` rounds. A program takes one row, or several
where rows are short, so that each of its threads has 16 bytes to load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError

MAX_SIZE = 16384  # a row stays in the registers of one program
TILE = 1024  # elements that a program takes at least, in several rows where those are shorter


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., E] whose last axis is contiguous, weight [E] of the same type -> [..., E], contiguous; see `reference.rms_norm`."""
    _check(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if out.numel():
        tiles = _Tiles.of(*rows.shape)
        rms_norm_kernel[(tiles.programs,)](
            rows, weight, out, len(rows), rows.stride(0), eps, tiles.size, tiles.rows, tiles.block, num_warps=tiles.warps
        )
    return out.view(x.shape)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, delta [T, E] with contiguous last axes, weight [E], all of one type -> x + delta and its norm, both [T, E]."""
    _check(x, weight)
    _check(delta, weight)
    if x.dim() != 2 or x.shape != delta.shape:
        raise InternalError(
            f"what is added and normed must be two of one shape [T, E], not {list(x.shape)} and {list(delta.shape)}"
        )
    total, out = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        tiles = _Tiles.of(*x.shape)
        add_rms_norm_kernel[(tiles.programs,)](
            x, delta, weight, total, out, len(x), x.stride(0), delta.stride(0), eps,
            tiles.size, tiles.rows, tiles.block, num_warps=tiles.warps,
        )  # fmt: skip
    return total, out


def norm_heads(qkv: Tensor, num_kv_heads: int, query_weight: Tensor, key_weight: Tensor, eps: float) -> None:
    """The RMSNorm of each query and key head of qkv [T, H + 2K, D] alone, in place; weights [D] of the type of qkv.

    Value heads stay as they are. The heads of a token must be contiguous.
    """
    _check(qkv, query_weight)
    _check(qkv, key_weight)
    tokens, heads, size = qkv.shape
    if qkv.stride(1) != size or not 0 < 2 * num_kv_heads < heads:
        raise InternalError(
            f"heads {list(qkv.shape)} with strides {qkv.stride()}, {num_kv_heads} of them keys, cannot be normed in place"
        )
    normed = heads - num_kv_heads
    if tokens:
        tiles = _Tiles.of(tokens * normed, size)
        norm_heads_kernel[(tiles.programs,)](
            qkv, query_weight, key_weight, tokens * normed, normed - num_kv_heads, normed, qkv.stride(0), eps,
            tiles.size, tiles.rows, tiles.block, num_warps=tiles.warps,
        )  # fmt: skip


def _check(x: Tensor, weight: Tensor) -> None:
    size = x.shape[-1]
    if weight.shape != (size,) or weight.dtype != x.dtype or weight.stride(0) != 1:
        raise InternalError(
            f"a norm of {size} {x.dtype} needs a weight of that size and type, not {list(weight.shape)} {weight.dtype}"
        )
    if not 1 <= size <= MAX_SIZE or x.stride(-1) != 1:
        raise InternalError(
            f"rows of {size} elements, {x.stride(-1)} apart, cannot be normed: 1 to {MAX_SIZE} that are contiguous can"
        )


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How rows are shared out: programs of `rows` rows of `size` elements each, padded to `block`."""

    programs: int
    size: int
    rows: int
    block: int
    warps: int

    @classmethod
    def of(cls, num_rows: int, size: int) -> _Tiles:
        block = triton.next_power_of_2(size)
        rows = max(1, TILE // block)
        return cls(triton.cdiv(num_rows, rows), size, rows, block, min(16, max(1, rows * block // 256)))


@triton.jit
def _normed(x: tl.tensor, weight: tl.tensor, size: int, eps: float) -> tl.tensor:
    """x [rows, block], zeros behind `size`, and weight, which broadcasts to it -> the norm in the type of x."""
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / size
    narrow = (wide * (1.0 / tl.sqrt_rn(mean_square + eps))[:, None]).to(x.dtype)
    return (narrow.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    x_stride: int,
    eps: float,
    size: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """x [num_rows, size] with rows `x_stride` apart -> out [num_rows, size], contiguous."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, block)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    scale = tl.load(weight + column, mask=column < size, other=0.0)[None, :]
    tl.store(out + row[:, None] * size + column[None, :], _normed(values, scale, size, eps), mask=inside)


@triton.jit
def add_rms_norm_kernel(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    x_stride: int,
    delta_stride: int,
    eps: float,
    size: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """total = x + delta, rounded to their type, and out its norm, all [num_rows, size]."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, block)
    inside = (row < num_rows)[:, None] & (column < size)[None, :]
    first = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    second = tl.load(delta + row[:, None] * delta_stride + column[None, :], mask=inside, other=0.0)
    added = (first.to(tl.float32) + second.to(tl.float32)).to(first.dtype)
    place = row[:, None] * size + column[None, :]
    tl.store(total + place, added, mask=inside)
    scale = tl.load(weight + column, mask=column < size, other=0.0)[None, :]
    tl.store(out + place, _normed(added, scale, size, eps), mask=inside)


@triton.jit
def norm_heads_kernel(
    qkv: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    num_normed: int,
    num_query_heads: int,
    num_heads: int,
    token_stride: int,
    eps: float,
    size: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The first `num_heads` heads of each token, queries and then keys, are normed where they lie.

    qkv [tokens, heads, size], the heads of a token contiguous; num_normed = tokens * num_heads.
    """
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    token, head = row // num_heads, row % num_heads
    column = tl.arange(0, block)
    inside = (row < num_normed)[:, None] & (column < size)[None, :]
    place = qkv + token[:, None] * token_stride + head[:, None] * size + column[None, :]
    of_query = tl.load(query_weight + column, mask=column < size, other=0.0)
    of_key = tl.load(key_weight + column, mask=column < size, other=0.0)
    weight = tl.where((head < num_query_heads)[:, None], of_query[None, :], of_key[None, :])
    values = tl.load(place, mask=inside, other=0.0)
    tl.store(place, _normed(values, weight, size, eps), mask=inside)
