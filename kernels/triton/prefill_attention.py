"""Attention of rows with many tokens over their paged cache, which holds the new keys and values already: one launch for all.

A program takes one KV head and a run of tokens of one row, with the KV head's query group folded in: M = tokens x group
query vectors. So a tile of keys and values is read once for all heads that share it, and the diagonal, where work is
masked away, is only M / group tokens wide. Tiles that every query sees whole run without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..batch import AttentionSpec
from .launches import prefill_launch
from .step_tensors import StepTensors
from .tiles import attend_tiles, padded, score_factors


def prefill_attention(
    qkv: Tensor, pool: Tensor, scales: Tensor | None, step: StepTensors, spec: AttentionSpec, out: Tensor
) -> None:
    """Write the outputs of the step's prefill rows.

    qkv     [T, H + 2K, D], its queries turned
    pool    [N, 2, K, S, D], one layer of the cache
    scales  float32 [2, K] that stored keys and values are to be multiplied by, or None
    out     [T, H * D]; tokens of other rows are left alone
    """
    kv_heads, block_size, head_dim = pool.shape[2:]
    heads = qkv.shape[1] - 2 * kv_heads
    group = heads // kv_heads
    launch = prefill_launch(qkv, pool, spec)
    rows = max(launch.rows, padded(group))
    first = step.sizes.num_decode
    _prefill[(kv_heads, qkv.shape[0] // (rows // group) + step.sizes.num_prefill)](
        out,
        qkv,
        pool,
        scales,
        step.block_tables[first:],
        step.starts,
        step.lengths,
        step.offsets,
        first,
        step.sizes.num_prefill,
        *score_factors(spec),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        pool.stride(3),
        step.sizes.max_blocks,
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_lanes=rows,
        window=spec.window or 0,
        capped=spec.softcap is not None,
        tile_size=launch.tile,
        block_size=block_size,
        head_dim=head_dim,
        padded_dim=padded(head_dim),
        **launch.options,
    )


@triton.jit(do_not_specialize=["first_row", "num_rows"], do_not_specialize_on_alignment=["scales"])
def _prefill(
    out: tl.tensor,
    qkv: tl.tensor,
    pool: tl.tensor,
    scales: tl.tensor | None,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    offsets: tl.tensor,
    first_row: int,
    num_rows: int,
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
    """Grid (K, T // tokens of a program + rows); `tables` begins with the first prefill row, the other tensors with row 0."""
    group: tl.constexpr = num_heads // num_kv_heads
    run: tl.constexpr = num_lanes // group
    kv_head = tl.program_id(0)
    # From the end: the tokens that see most come first, and what is left at the end is short.
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    row = _row_of(offsets + first_row, num_rows, program, run)
    offset = tl.load(offsets + first_row + row)
    start = tl.load(starts + first_row + row)
    num_tokens = tl.load(lengths + first_row + row) - start
    first_token = (program - (offset // run + row)) * run
    if first_token < 0 or first_token >= num_tokens:
        return

    lanes = tl.arange(0, num_lanes)
    tokens = first_token + lanes // group  # [M] tokens of the row
    wanted = (lanes < run * group) & (tokens < num_tokens)
    heads = kv_head * group + lanes % group
    dims = tl.arange(0, padded_dim)
    mask = wanted[:, None] & (dims[None, :] < head_dim)
    packed = (offset + tokens).to(tl.int64)
    stored = (packed * ((num_heads + 2 * num_kv_heads) * head_dim) + heads * head_dim)[:, None] + dims[None, :]
    query = tl.load(qkv + stored, mask=mask, other=0.0)
    positions = start + tl.minimum(tokens, num_tokens - 1)  # lanes of no token see something too: no sum of theirs is 0

    first_position = start + first_token
    end = start + tl.minimum(first_token + run, num_tokens)
    whole_end = (first_position + 1) // tile_size * tile_size  # every query sees the tiles below whole
    if window > 0:
        first_seen = tl.maximum(first_position - window + 1, 0)
        begin = first_seen // tile_size * tile_size
        whole_begin = tl.cdiv(tl.maximum(end - window, 0), tile_size) * tile_size  # and those from here on
    else:
        first_seen = 0
        begin = 0
        whole_begin = 0
    whole_end = tl.maximum(whole_begin, whole_end)
    if scales is not None:
        key_scale = tl.load(scales + kv_head)
        if capped:
            inner_scale *= key_scale
        else:
            outer_scale *= key_scale

    keys = pool + kv_head * stride_head
    values = keys + stride_part
    table = tables + row * stride_table
    mixed = tl.zeros([num_lanes, padded_dim], tl.float32)
    best = tl.full([num_lanes], float("-inf"), tl.float32)
    total = tl.zeros([num_lanes], tl.float32)
    if window > 0:
        mixed, best, total = attend_tiles(
            query, mixed, best, total, keys, values, table, positions, begin, whole_begin, first_seen, end,
            inner_scale, outer_scale, stride_block, stride_slot,
            True, window, capped, tile_size, block_size, head_dim, padded_dim,
        )  # fmt: skip
    mixed, best, total = attend_tiles(
        query, mixed, best, total, keys, values, table, positions, whole_begin, whole_end, first_seen, end,
        inner_scale, outer_scale, stride_block, stride_slot,
        False, window, capped, tile_size, block_size, head_dim, padded_dim,
    )  # fmt: skip
    mixed, best, total = attend_tiles(
        query, mixed, best, total, keys, values, table, positions, whole_end, end, first_seen, end,
        inner_scale, outer_scale, stride_block, stride_slot,
        True, window, capped, tile_size, block_size, head_dim, padded_dim,
    )  # fmt: skip
    mixed = mixed / total[:, None]
    if scales is not None:
        mixed *= tl.load(scales + num_kv_heads + kv_head)
    at = (packed * (num_heads * head_dim) + heads * head_dim)[:, None] + dims[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _row_of(offsets: tl.tensor, num_rows: int, program: int, run: tl.constexpr) -> int:
    """The row that a program works for: row i owns the programs from offsets[i] // run + i to where the next row's begin.

    That is room for every run of tokens that row i has, found without a list that the host would have to make.
    """
    low = 0
    high = num_rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(offsets + middle) // run + middle <= program:
            low = middle
        else:
            high = middle
    return low
