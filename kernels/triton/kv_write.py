"""Turns queries and keys by their positions and stores keys and values in the paged cache, in one pass over qkv.

With scales the cache holds what they divide, rounded to its type (float8_e4m3fn as a rule) and cut to that type's range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..interface import Turn

HEADS_AT_ONCE = 16
LARGEST = {torch.float8_e4m3fn: 448.0}  # of types that have no infinity to overflow to


def turn_and_store(qkv: Tensor, pool: Tensor, scales: Tensor | None, slots: Tensor, turn: Turn | None) -> None:
    """Turn the queries in place; turn and store the keys, store the values.

    qkv     [T, H + 2K, D]; keys and values are left as they were
    pool    [N, 2, K, S, D], one layer of the cache
    scales  float32 [2, K]: a stored number times its head's scale is what it stands for. None stores what there is
    slots   int32 [T], block * S + slot of each token, -1 for a token that is not stored
    turn    cos and sin [T, D / 2], or None where nothing is turned
    """
    kv_heads, block_size, head_dim = pool.shape[2:]
    all_heads = qkv.shape[1]
    first = 0 if turn is not None else all_heads - 2 * kv_heads  # queries that are not turned stay as they are
    cos, sin = (None, None) if turn is None else turn
    _turn_and_store[(qkv.shape[0], triton.cdiv(all_heads - first, HEADS_AT_ONCE))](
        qkv,
        pool,
        scales,
        slots,
        cos,
        sin,
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        pool.stride(3),
        first_head=first,
        num_heads=all_heads - 2 * kv_heads,
        num_kv_heads=kv_heads,
        largest=LARGEST.get(pool.dtype, 0.0),
        block_size=block_size,
        half=head_dim // 2,
        padded_half=triton.next_power_of_2(head_dim // 2),
        at_once=HEADS_AT_ONCE,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize_on_alignment=["scales", "cos", "sin"])
def _turn_and_store(
    qkv: tl.tensor,
    pool: tl.tensor,
    scales: tl.tensor | None,
    slots: tl.tensor,
    cos: tl.tensor | None,
    sin: tl.tensor | None,
    stride_block: int,
    stride_part: int,
    stride_head: int,
    stride_slot: int,
    first_head: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    largest: tl.constexpr,
    block_size: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """Grid (T, heads / at_once)."""
    token = tl.program_id(0).to(tl.int64)
    heads = first_head + tl.program_id(1) * at_once + tl.arange(0, at_once)
    dims = tl.arange(0, padded_half)
    inside = (heads[:, None] < num_heads + 2 * num_kv_heads) & (dims[None, :] < half)
    at = qkv + token * ((num_heads + 2 * num_kv_heads) * 2 * half) + heads[:, None] * (2 * half) + dims[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)  # [heads, D / 2]
    high = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if cos is not None:
        c = tl.load(cos + token * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + token * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
        turned = heads[:, None] < num_heads + num_kv_heads
        low, high = tl.where(turned, low * c - high * s, low), tl.where(turned, high * c + low * s, high)
        queries = inside & (heads[:, None] < num_heads)
        tl.store(at, low.to(qkv.dtype.element_ty), mask=queries)
        tl.store(at + half, high.to(qkv.dtype.element_ty), mask=queries)

    slot = tl.load(slots + token)
    if slot < 0:
        return
    stored = heads - num_heads  # key heads, then value heads
    mask = inside & (stored[:, None] >= 0)
    if scales is not None:
        scale = tl.load(scales + stored, mask=(stored >= 0) & (stored < 2 * num_kv_heads), other=1.0)[:, None]
        low, high = low / scale, high / scale
    if largest > 0:
        low = tl.minimum(tl.maximum(low, -largest), largest)
        high = tl.minimum(tl.maximum(high, -largest), largest)
    begin = (slot // block_size).to(tl.int64) * stride_block + (slot % block_size) * stride_slot
    to = pool + begin + ((stored // num_kv_heads) * stride_part + (stored % num_kv_heads) * stride_head)[:, None] + dims[None, :]
    tl.store(to, low.to(pool.dtype.element_ty), mask=mask)
    tl.store(to + half, high.to(pool.dtype.element_ty), mask=mask)
