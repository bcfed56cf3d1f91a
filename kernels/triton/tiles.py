"""What prefill and decode attention share: the loop over tiles of keys and values in the paged cache, with its softmax.

Online softmax as in flash attention (Dao et al. 2022; Dao 2023): scores stay unscaled, and exp2 with log2(e) folded into
the scale makes each probability one multiply-add and one exponential.
Letters as in `reference`; M queries of a program (a KV head's query group is folded into them), C positions of a tile.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...core.errors import InternalError
from ..batch import AttentionSpec

LOG2_E = math.log2(math.e)
SMALLEST_DOT = 16  # rows and columns of the smallest matrix product


def padded(size: int) -> int:
    """The extent of a tile that holds `size` elements: a power of two that a matrix product can have."""
    return max(SMALLEST_DOT, 1 << (size - 1).bit_length())


def score_factors(spec: AttentionSpec) -> tuple[float, float]:
    """What scores are multiplied by for the exponential in the soft cap's tanh (unused without cap), and for their own exp2."""
    if spec.scale <= 0:
        raise InternalError(f"the kernels find the largest score before scaling, so the scale must be above 0, got {spec.scale}")
    if spec.softcap is None:
        return 1.0, spec.scale * LOG2_E
    return 2 * LOG2_E * spec.scale / spec.softcap, spec.softcap * LOG2_E


@triton.jit
def attend_tiles(
    query: tl.tensor,
    mixed: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    begin: int,
    end: int,
    first_seen: int,
    last_seen: int,
    inner_scale: float,
    outer_scale: float,
    stride_block: int,
    stride_slot: int,
    masked: tl.constexpr,
    window: tl.constexpr,
    capped: tl.constexpr,
    tile_size: tl.constexpr,
    block_size: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the tiles that begin at `begin`, `begin` + C, ... below `end`, `begin` a multiple of C.

    query [M, D]; mixed [M, D], best [M] and total [M] are the running sum of values, largest score and sum of
    probabilities, returned anew. positions [M] of the queries. Without masked every position of the tiles is visible to
    every query; with it, nothing outside [first_seen, last_seen) is read, and what is not visible to a query is hidden.
    """
    dims = tl.arange(0, padded_dim)
    for tile in tl.range(begin, end, tile_size):
        places = tile + tl.arange(0, tile_size)  # [C]
        readable = (places >= first_seen) & (places < last_seen)
        if block_size % tile_size == 0:
            start = tl.load(table + tile // block_size).to(tl.int64) * stride_block  # the whole tile is in one block
            offsets = start + (places % block_size) * stride_slot
        else:
            if masked:
                blocks = tl.load(table + places // block_size, mask=readable, other=0)
            else:
                blocks = tl.load(table + places // block_size)
            offsets = blocks.to(tl.int64) * stride_block + (places % block_size) * stride_slot
        at = offsets[:, None] + dims[None, :]  # [C, D]
        if masked:
            mask = readable[:, None] & (dims[None, :] < head_dim)
            key = tl.load(keys + at, mask=mask, other=0.0)
            value = tl.load(values + at, mask=mask, other=0.0)
        elif head_dim < padded_dim:
            key = tl.load(keys + at, mask=dims[None, :] < head_dim, other=0.0)
            value = tl.load(values + at, mask=dims[None, :] < head_dim, other=0.0)
        else:
            key = tl.load(keys + at)
            value = tl.load(values + at)
        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")  # [M, C]
        if capped:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends too
            scores = 1.0 - 2.0 / (tl.exp2(scores * inner_scale) + 1.0)
        if masked:
            visible = (places[None, :] <= positions[:, None]) & readable[None, :]
            if window > 0:
                visible = visible & (places[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        best_now = tl.maximum(best, tl.max(scores, 1))
        # A query that has seen nothing yet: -inf - -inf would be NaN.
        reference = tl.where(best_now == float("-inf"), 0.0, best_now) if masked else best_now
        weights = tl.exp2(scores * outer_scale - (reference * outer_scale)[:, None])  # [M, C]
        faded = tl.exp2((best - reference) * outer_scale)
        total = total * faded + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(query.dtype), value.to(query.dtype), mixed * faded[:, None], input_precision="ieee")
        best = best_now
    return mixed, best, total
