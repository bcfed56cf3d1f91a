"""Attention of one new token per row over its paged cache: parts of contexts in parallel, then one sum over the parts.

Flash-decoding (Dao et al. 2023) over a list of parts that are about equally long, whatever the rows' contexts: the work
fills the device for one long row as well as for many short ones. `step_tensors` makes the list. A program takes one part
and one KV head, with the KV head's query group as rows of the matrix products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import AttentionSpec
from .launches import decode_launch
from .step_tensors import StepTensors
from .tiles import attend_tiles, padded, score_factors


def decode_attention(
    qkv: Tensor, pool: Tensor, scales: Tensor | None, step: StepTensors, spec: AttentionSpec, out: Tensor
) -> None:
    """Write the outputs of the step's decode rows; see `prefill_attention.prefill_attention`."""
    sizes = step.sizes
    kv_heads, block_size, head_dim = pool.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    group = heads // kv_heads
    launch = decode_launch(qkv)
    split = sizes.num_parts != sizes.num_decode
    partial = weight = None
    if split:
        partial = torch.empty((sizes.num_parts, kv_heads, group, head_dim), dtype=torch.float32, device=out.device)
        weight = torch.empty((sizes.num_parts, kv_heads, group), dtype=torch.float32, device=out.device)
    _decode[(kv_heads, sizes.num_parts)](
        out,
        partial,
        weight,
        qkv,
        pool,
        scales,
        step.block_tables,
        step.lengths,
        step.offsets,
        step.parts,
        step.first_parts,
        *score_factors(spec),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        pool.stride(3),
        sizes.max_blocks,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_lanes=padded(group),
        window=spec.window or 0,
        capped=spec.softcap is not None,
        tile_size=launch.tile,
        block_size=block_size,
        head_dim=head_dim,
        padded_dim=padded(head_dim),
        **launch.options,
    )
    if split:
        _sum_parts[(heads, sizes.num_decode)](
            out,
            partial,
            weight,
            step.offsets,
            step.first_parts,
            head_dim=head_dim,
            padded_dim=padded(head_dim),
            at_once=16,
            num_warps=2,
            enable_fp_fusion=True,
        )


@triton.jit(do_not_specialize_on_alignment=["scales"])
def _decode(
    out: tl.tensor,
    partial: tl.tensor | None,
    weight: tl.tensor | None,
    qkv: tl.tensor,
    pool: tl.tensor,
    scales: tl.tensor | None,
    tables: tl.tensor,
    lengths: tl.tensor,
    offsets: tl.tensor,
    parts: tl.tensor,
    first_parts: tl.tensor,
    inner_scale: float,
    outer_scale: float,
    stride_block: int,
    stride_part: int,
    stride_head: int,
    stride_slot: int,
    stride_table: int,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    num_lanes: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    tile_size: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
) -> None:
    """Grid (K, P). The only part of a row goes to out [T, H * D]; else the part's output goes to partial [P, H, D] and the
    logarithm of its sum of weights to weight [P, H], both float32 (None when no row has several parts)."""
    group: tl.constexpr = num_heads // num_kv_heads
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    row = tl.load(parts + 2 * part)
    if row < 0:
        return
    length = tl.load(lengths + row)
    num_parts = tl.load(first_parts + row + 1) - tl.load(first_parts + row)
    first_seen = tl.maximum(length - window, 0) if window > 0 else 0
    origin = first_seen // tile_size * tile_size
    # Parts share what this layer's window leaves of the context.
    share = tl.cdiv(tl.cdiv(length - origin, tile_size), num_parts) * tile_size
    begin = origin + tl.load(parts + 2 * part + 1) * share
    end = tl.minimum(begin + share, length)
    if scales is not None:
        key_scale = tl.load(scales + kv_head)
        if capped:
            inner_scale *= key_scale
        else:
            outer_scale *= key_scale

    lanes = tl.arange(0, num_lanes)
    heads = kv_head * group + lanes
    dims = tl.arange(0, padded_dim)
    mask = (lanes[:, None] < group) & (dims[None, :] < head_dim)
    at = heads[:, None] * head_dim + dims[None, :]
    token = tl.load(offsets + row).to(tl.int64)
    query = tl.load(qkv + token * ((num_heads + 2 * num_kv_heads) * head_dim) + at, mask=mask, other=0.0)
    keys = pool + kv_head * stride_head
    position = tl.zeros([num_lanes], tl.int32) + (length - 1)
    mixed = tl.zeros([num_lanes, padded_dim], tl.float32)
    best = tl.full([num_lanes], float("-inf"), tl.float32)
    total = tl.zeros([num_lanes], tl.float32)
    mixed, best, total = attend_tiles(
        query, mixed, best, total, keys, keys + stride_part, tables + row * stride_table, position, begin, end, first_seen, end,
        inner_scale, outer_scale, stride_block, stride_slot,
        True, 0, capped, tile_size, block_size, head_dim, padded_dim,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a part that a window leaves nothing of: output 0, weight 0
    mixed = mixed / total[:, None]
    if scales is not None:
        mixed *= tl.load(scales + num_kv_heads + kv_head)
    if weight is None:  # noqa: SIM114 (decided when it is compiled: behind an `or` it would not be)
        tl.store(out + token * (num_heads * head_dim) + at, mixed.to(out.dtype.element_ty), mask=mask)
    elif num_parts == 1:
        tl.store(out + token * (num_heads * head_dim) + at, mixed.to(out.dtype.element_ty), mask=mask)
    else:
        first = part.to(tl.int64) * num_heads
        tl.store(partial + first * head_dim + at, mixed, mask=mask)
        tl.store(weight + first + heads, best * outer_scale + tl.log2(total), mask=lanes < group)


@triton.jit
def _sum_parts(
    out: tl.tensor,
    partial: tl.tensor,
    weight: tl.tensor,
    offsets: tl.tensor,
    first_parts: tl.tensor,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    at_once: tl.constexpr,
) -> None:
    """Grid (H, decode rows): the rows of several parts, weighted by what each part's softmax summed up to; 0 for padding rows."""
    head = tl.program_id(0)
    row = tl.program_id(1)
    num_heads = tl.num_programs(0)
    begin = tl.load(first_parts + row)
    end = tl.load(first_parts + row + 1)
    token = tl.load(offsets + row).to(tl.int64)
    if end - begin == 1 or token < 0:
        return
    dims = tl.arange(0, padded_dim)
    mixed = tl.zeros([padded_dim], tl.float32)
    best = -float("inf")
    total = 0.0
    for first in tl.range(begin, end, at_once):
        parts = first + tl.arange(0, at_once)
        at = parts.to(tl.int64) * num_heads + head
        weights = tl.load(weight + at, mask=parts < end, other=float("-inf"))  # [at_once], base 2
        best_now = tl.maximum(best, tl.max(weights, 0))
        reference = tl.where(best_now == float("-inf"), 0.0, best_now)
        faded = tl.exp2(best - reference)
        weights = tl.exp2(weights - reference)
        some = tl.load(
            partial + (at * head_dim)[:, None] + dims[None, :],
            mask=(parts < end)[:, None] & (dims[None, :] < head_dim),
            other=0.0,
        )
        mixed = mixed * faded + tl.sum(some * weights[:, None], 0)
        total = total * faded + tl.sum(weights, 0)
        best = best_now
    mixed = mixed / tl.where(total == 0.0, 1.0, total)
    tl.store(out + token * (num_heads * head_dim) + head * head_dim + dims, mixed.to(out.dtype.element_ty), mask=dims < head_dim)
