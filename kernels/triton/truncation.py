"""Which tokens a draw leaves in the race, on a GPU: min-p, top-k and top-p as `reference.truncate` has them, without a sort.

A token's **key** is the distance of its scaled logit below the likeliest one's, as the bits of that float32: positive
floats order as their bits do, so keys are integers from 0 to that of infinity, which stands for the impossible. Top-k
keeps the keys q with fewer than k tokens below q; top-p those with less than the share p of the mass below q. Both are
monotone in q, so each is one largest integer key, found by search: every pass over the logits counts tokens and mass below
several pivots at once. The first pass is shared by all programs of a row; once what is undecided is few tokens, only
those are looked at. Tokens that tie have one key, so they stay or go together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .draw_parameters import REACH, TEMPERATURE, TOP_K, TOP_P, read_float, read_int
from .slices import SLICE, Best, Rows, row_maximum

NUM_FIRST_PIVOTS = 16  # of the first pass
NUM_PIVOTS = 8  # of each later pass: more would cost more than the passes they save
COUNT_TILE = 512  # sums below every pivot stay in registers, for each of so many tokens
SEARCH_TILE = 2048
MAX_HELD = 2048  # undecided tokens that one program holds in its registers

INFINITY_KEY = tl.constexpr(0x7F800000)
_FIRST_PIVOT = tl.constexpr(0x3E000000)  # the key of 0.125
_PIVOT_STEP = tl.constexpr(1 << 22)  # a factor of 1.5 or 1.33 between first pivots: the last but one lies at 16


def find_limits(rows: Rows, likeliest: Best, parameters: Tensor) -> Tensor:
    """The largest key that each row keeps: int32 [R], of `draw_words.pack`'s parameters and the rows' likeliest tokens."""
    limits, held = rows.empty(torch.int32), rows.empty(torch.int32, MAX_HELD)
    counts, masses = (rows.empty(torch.float32, rows.num_slices, NUM_FIRST_PIVOTS) for _ in range(2))
    if rows.count:
        of_rows = rows.vocabulary, rows.logits.stride(0), parameters.stride(0), rows.num_slices
        count_kernel[rows.grid](
            rows.logits, parameters, likeliest.score, counts, masses, *of_rows, SLICE, COUNT_TILE, rows.padded_slices,
            NUM_FIRST_PIVOTS, num_warps=8,
        )  # fmt: skip
        search_kernel[(rows.count,)](
            rows.logits, parameters, likeliest.score, counts, masses, held, limits, *of_rows, SEARCH_TILE, rows.padded_slices,
            NUM_FIRST_PIVOTS, NUM_PIVOTS, MAX_HELD, num_warps=16,
        )  # fmt: skip
    return limits


@triton.jit
def keys_of(logits: tl.tensor, likeliest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """float32 [N] -> int32 [N]. The division is exact, so that ties are those of the reference."""
    distance = tl.div_rn(likeliest - logits, tl.zeros_like(logits) + temperature)
    return distance.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def distances_of(keys: tl.tensor) -> tl.tensor:
    """int32 [N] -> float32 [N]."""
    return keys.to(tl.float32, bitcast=True)


@triton.jit
def _is_truncated(parameters: tl.tensor, stride: int, row: int, vocabulary: int) -> tl.tensor:
    """Whether top-k or top-p may drop tokens of a row."""
    top_k = read_int(parameters, TOP_K, stride, row)
    drawn = read_float(parameters, TEMPERATURE, stride, row) > 0.0
    return drawn & (((top_k > 0) & (top_k < vocabulary)) | (read_float(parameters, TOP_P, stride, row) < 1.0))


@triton.jit
def _last_in_reach(parameters: tl.tensor, stride: int, row: int) -> tl.tensor:
    """The largest key that min-p leaves, finite."""
    reach = read_float(parameters, REACH, stride, row)
    return tl.minimum(reach.to(tl.int32, bitcast=True) & 0x7FFFFFFF, INFINITY_KEY - 1)


@triton.jit
def _first_pivots(last_in_reach: tl.tensor, num_pivots: tl.constexpr) -> tl.tensor:
    """int32 [num_pivots]: the last one bounds what min-p leaves."""
    place = tl.arange(0, num_pivots)
    return tl.where(place == num_pivots - 1, last_in_reach + 1, _FIRST_PIVOT + place * _PIVOT_STEP)


@triton.jit
def count_kernel(
    logits: tl.tensor,
    parameters: tl.tensor,
    highest: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    vocabulary: int,
    logits_stride: int,
    parameters_stride: int,
    num_slices: int,
    size: tl.constexpr,
    tile: tl.constexpr,
    padded_slices: tl.constexpr,
    num_pivots: tl.constexpr,
) -> None:
    """Tokens and mass of one slice of one row below each of the first pivots: counts and masses [R, slices, num_pivots]."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _is_truncated(parameters, parameters_stride, row, vocabulary):
        temperature = read_float(parameters, TEMPERATURE, parameters_stride, row)
        likeliest = row_maximum(highest, row, num_slices, padded_slices)
        pivots = _first_pivots(_last_in_reach(parameters, parameters_stride, row), num_pivots)
        end = tl.minimum((part + 1) * size, vocabulary)
        count, mass = _below(logits + row * logits_stride, part * size, end, likeliest, temperature, pivots, tile, num_pivots)
        place = (row * num_slices + part) * num_pivots + tl.arange(0, num_pivots)
        tl.store(counts + place, count)
        tl.store(masses + place, mass)


@triton.jit
def _below(
    logits: tl.tensor,
    begin: int,
    end: int,
    likeliest: tl.tensor,
    temperature: tl.tensor,
    pivots: tl.tensor,
    tile: tl.constexpr,
    num_pivots: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens, as float32, and mass of logits[begin:end] with keys below each pivot, both [num_pivots].

    A token's mass is exp of its scaled logit, the likeliest one's 1. Counts are exact: vocabularies are below 2**24.
    """
    count = tl.zeros([num_pivots, tile], dtype=tl.float32)
    mass = tl.zeros([num_pivots, tile], dtype=tl.float32)
    for at in range(begin, end, tile):
        token = at + tl.arange(0, tile)
        x = tl.load(logits + token, mask=token < end, other=float("-inf")).to(tl.float32)
        keys = keys_of(x, likeliest, temperature)
        below = keys[None, :] < pivots[:, None]
        count += tl.where(below, 1.0, 0.0)
        mass += tl.where(below, tl.exp(-distances_of(keys))[None, :], 0.0)
    return tl.sum(count, axis=1), tl.sum(mass, axis=1)


@triton.jit
def search_kernel(
    logits: tl.tensor,
    parameters: tl.tensor,
    highest: tl.tensor,
    counts: tl.tensor,
    masses: tl.tensor,
    held: tl.tensor,
    limits: tl.tensor,
    vocabulary: int,
    logits_stride: int,
    parameters_stride: int,
    num_slices: int,
    tile: tl.constexpr,
    padded_slices: tl.constexpr,
    num_first_pivots: tl.constexpr,
    num_pivots: tl.constexpr,
    max_held: tl.constexpr,
) -> None:
    """The largest key of one row that stays in the race: limits int32 [R]. held int32 [R, max_held] is scratch.

    Long, because the language has no records: the state of a search is six numbers, named at every call.
    """
    row = tl.program_id(0).to(tl.int64)
    limit = _last_in_reach(parameters, parameters_stride, row)
    if _is_truncated(parameters, parameters_stride, row, vocabulary):
        temperature = read_float(parameters, TEMPERATURE, parameters_stride, row)
        top_k = read_int(parameters, TOP_K, parameters_stride, row)
        top_p = read_float(parameters, TOP_P, parameters_stride, row)
        likeliest = row_maximum(highest, row, num_slices, padded_slices)
        pivots = _first_pivots(limit, num_first_pivots)
        part, place = tl.arange(0, padded_slices)[:, None], tl.arange(0, num_first_pivots)[None, :]
        partial = (row * num_slices + part) * num_first_pivots + place
        count = tl.sum(tl.load(counts + partial, mask=part < num_slices, other=0.0), axis=0)
        mass = tl.sum(tl.load(masses + partial, mask=part < num_slices, other=0.0), axis=0)
        # Of all in reach; sums of more tokens are never smaller.
        num_left, mass_left = tl.max(tl.where(pivots == limit + 1, count, 0.0)), tl.max(tl.where(pivots == limit + 1, mass, 0.0))
        own_logits, own_held = logits + row * logits_stride, held + row * max_held
        keys = tl.full([max_held], INFINITY_KEY, tl.int32)
        whole = num_left < 0  # whether `keys` are all that may still be kept
        if (top_k > 0) & (top_k < num_left):
            target = top_k.to(tl.float32)
            low, high, count_low, count_high, mass_low, mass_high = _bracket(
                target, pivots, count, mass, limit * 0, limit + 1, 0.0, num_left, 0.0, mass_left, False
            )
            low, high, count_low, count_high, mass_low, mass_high = _narrow_over_row(
                target, own_logits, vocabulary, likeliest, temperature,
                low, high, count_low, count_high, mass_low, mass_high, False, tile, num_pivots, max_held,
            )  # fmt: skip
            whole = count_high <= max_held
            first = tl.where(whole, 0, low)
            keys = _hold(own_logits, own_held, vocabulary, likeliest, temperature, first, high, tile, max_held)
            low, high, num_left, mass_left = _narrow_over_held(
                target, keys, low, high, tl.where(whole, 0.0, count_low), count_high,
                tl.where(whole, 0.0, mass_low), mass_high, False, num_pivots,
            )  # fmt: skip
            limit = low
        if top_p < 1.0:
            target = top_p * mass_left
            low, high, count_low, count_high, mass_low, mass_high = _bracket(
                target, pivots, count, mass, limit * 0, limit + 1, 0.0, num_left, 0.0, mass_left, True
            )
            if whole:
                count_low, mass_low = count_low * 0.0, mass_low * 0.0
            else:
                low, high, count_low, count_high, mass_low, mass_high = _narrow_over_row(
                    target, own_logits, vocabulary, likeliest, temperature,
                    low, high, count_low, count_high, mass_low, mass_high, True, tile, num_pivots, max_held,
                )  # fmt: skip
                keys = _hold(own_logits, own_held, vocabulary, likeliest, temperature, low, high, tile, max_held)
            low, high, num_left, mass_left = _narrow_over_held(
                target, keys, low, high, count_low, count_high, mass_low, mass_high, True, num_pivots
            )
            limit = low
    tl.store(limits + row, limit)


@triton.jit
def _bracket(
    target: tl.tensor,
    pivots: tl.tensor,
    count: tl.tensor,
    mass: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    count_low: tl.tensor,
    count_high: tl.tensor,
    mass_low: tl.tensor,
    mass_high: tl.tensor,
    by_mass: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Narrows [low, high) to the pivots [P] between which the sum below reaches the target.

    count and mass [P] are what is below each pivot, `_low` and `_high` what is below the ends. The sum below low is less
    than the target (or low is 0), that below high is not.
    """
    reached = (mass if by_mass else count) >= target
    lower = (pivots > low) & (pivots < high) & ~reached
    upper = (pivots > low) & (pivots < high) & reached
    # Sums never fall from a pivot to a larger one.
    low = tl.maximum(low, tl.max(tl.where(lower, pivots, 0)))
    high = tl.minimum(high, tl.min(tl.where(upper, pivots, INFINITY_KEY)))
    count_low = tl.maximum(count_low, tl.max(tl.where(lower, count, 0.0)))
    count_high = tl.minimum(count_high, tl.min(tl.where(upper, count, float("inf"))))
    mass_low = tl.maximum(mass_low, tl.max(tl.where(lower, mass, 0.0)))
    mass_high = tl.minimum(mass_high, tl.min(tl.where(upper, mass, float("inf"))))
    return low, high, count_low, count_high, mass_low, mass_high


@triton.jit
def _pivots_between(low: tl.tensor, high: tl.tensor, num_pivots: tl.constexpr) -> tl.tensor:
    """int32 [num_pivots], evenly from low to high; the last ones may lie behind it."""
    step = (high - low + num_pivots) // (num_pivots + 1)
    return low + (tl.arange(0, num_pivots) + 1) * step


@triton.jit
def _narrow_over_row(
    target: tl.tensor,
    logits: tl.tensor,
    vocabulary: int,
    likeliest: tl.tensor,
    temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    count_low: tl.tensor,
    count_high: tl.tensor,
    mass_low: tl.tensor,
    mass_high: tl.tensor,
    by_mass: tl.constexpr,
    tile: tl.constexpr,
    num_pivots: tl.constexpr,
    max_held: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Passes over the whole row until what lies in [low, high) can be held, or has one key."""
    while (high - low > 1) & (count_high - count_low > max_held):
        pivots = _pivots_between(low, high, num_pivots)
        count, mass = _below(logits, 0, vocabulary, likeliest, temperature, pivots, tile, num_pivots)
        low, high, count_low, count_high, mass_low, mass_high = _bracket(
            target, pivots, count, mass, low, high, count_low, count_high, mass_low, mass_high, by_mass
        )
    return low, high, count_low, count_high, mass_low, mass_high


@triton.jit
def _hold(
    logits: tl.tensor,
    held: tl.tensor,
    vocabulary: int,
    likeliest: tl.tensor,
    temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    tile: tl.constexpr,
    max_held: tl.constexpr,
) -> tl.tensor:
    """The keys of a row in [low, high), in the order of their tokens: int32 [max_held], infinity behind the last."""
    wide: tl.constexpr = 4 * tile  # each tile costs one scan over all threads
    found = 0
    for at in range(0, vocabulary, wide):
        token = at + tl.arange(0, wide)
        x = tl.load(logits + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        keys = keys_of(x, likeliest, temperature)
        inside = ((keys >= low) & (keys < high)).to(tl.int32)
        place = found + tl.cumsum(inside, axis=0) - 1
        tl.store(held + place, keys, mask=(inside > 0) & (place < max_held))
        found += tl.sum(inside, axis=0)
    tl.debug_barrier()  # the threads read what others wrote
    place = tl.arange(0, max_held)
    return tl.load(held + place, mask=place < found, other=INFINITY_KEY)


@triton.jit
def _narrow_over_held(
    target: tl.tensor,
    keys: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    count_before: tl.tensor,
    count_high: tl.tensor,
    mass_before: tl.tensor,
    mass_high: tl.tensor,
    by_mass: tl.constexpr,
    num_pivots: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Narrows until high = low + 1; returns low, high and what is below high, as count and mass.

    keys int32 [max_held] hold all that lie in [low, high), `_before` is what lies below the least that may be held.
    """
    weights = tl.exp(-distances_of(keys))[None, :]
    while high - low > 1:
        pivots = _pivots_between(low, high, num_pivots)
        below = keys[None, :] < pivots[:, None]
        count = count_before + tl.sum(tl.where(below, 1.0, 0.0), axis=1)
        mass = mass_before + tl.sum(tl.where(below, weights, 0.0), axis=1)
        low, high, _, count_high, _, mass_high = _bracket(
            target, pivots, count, mass, low, high, 0.0, count_high, 0.0, mass_high, by_mass
        )
    return low, high, count_high, mass_high
