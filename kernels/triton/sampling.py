"""From logits to tokens on a GPU: argmax, and draws whose random bits are those of the CPU; greedy and drawn rows together.

Every row is cut into slices of a fixed size, each worked on by a program of its own, so that a single row fills the
device and a row's token never depends on the rows beside it. Five launches, whatever the rows ask for, with no answer
from the device in between: they can be captured in a CUDA graph.

  summarise  the likeliest token of each slice
  count      what lies below a first set of pivots, of rows that top-k or top-p truncates (see `truncation`)
  search     the last key kept, one program a row
  draw       Gumbel-max over what is kept, in each slice
  pick       the best of a row's slices: of the first launch for greedy rows, of the fourth for the others
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError
from ..batch import DrawSpec
from ..draw_words import NUM_FIELDS, pack
from .draw_parameters import OUTPUT_INDEX, SEED_HIGH, SEED_LOW, SEQUENCE_INDEX, TEMPERATURE, read_float, read_int
from .noise import gumbel_noise, random_words
from .slices import SLICE, Best, Rows, row_maximum, summarise
from .truncation import distances_of, find_limits, keys_of

DRAW_TILE = 1024  # noise is made for all of a tile, or for none of it when none of its tokens is kept

# The key of 26. The likeliest token's score is its noise, at least -2.82, the log of 24 ln 2; noise is 22.88 at most,
# 33 ln 2: no token that lies this far below can win, and none needs noise.
_HOPELESS = tl.constexpr(0x41D00000)


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token of every row, the lowest of equals: [R, V] of any float type -> int64 [R]."""
    rows = Rows.of(logits)
    best = summarise(rows)
    return _pick(rows, best, best, None)


def sample(logits: Tensor, parameters: Tensor) -> Tensor:
    """A token for every row: logits [R, V] of any float type, parameters int32 [NUM_FIELDS, >= R] -> int64 [R].

    The parameters are `draw_words.pack`'s, on the device of the logits. A row of temperature 0 takes the argmax; the
    others are drawn as by `reference.draw`. A token at -inf or NaN is impossible; of a row where all are, any may come.
    Nothing waits for the device.
    """
    rows = Rows.of(logits)
    if parameters.dtype != torch.int32 or parameters.dim() != 2 or parameters.stride(1) != 1:
        raise InternalError(
            f"sampling needs int32 parameters with contiguous rows, not {parameters.dtype} {list(parameters.shape)}"
        )
    if parameters.shape[0] != NUM_FIELDS or parameters.shape[1] < rows.count or parameters.device != logits.device:
        raise InternalError(
            f"{rows.count} rows on {logits.device} need parameters [{NUM_FIELDS}, R] there, "
            f"not {list(parameters.shape)} on {parameters.device}"
        )
    best, drawn = summarise(rows), Best.empty(rows)
    limits = find_limits(rows, best, parameters)
    if rows.count:
        draw_kernel[rows.grid](
            logits, parameters, best.score, limits, drawn.score, drawn.token, rows.vocabulary, logits.stride(0),
            parameters.stride(0), rows.num_slices, SLICE, DRAW_TILE, rows.padded_slices, num_warps=4,
        )  # fmt: skip
    return _pick(rows, best, drawn, parameters)


def draw(logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
    """A token for every row of logits, [R, V] of any float type -> int64 [R]; see `reference.draw`."""
    if len(specs) != len(logits):
        raise InternalError(f"{len(logits)} rows of logits cannot be drawn from with {len(specs)} specs")
    return sample(logits, pack(specs).to(logits.device, non_blocking=True))


def _pick(rows: Rows, likeliest: Best, drawn: Best, parameters: Tensor | None) -> Tensor:
    """Without parameters all rows are greedy."""
    tokens = rows.empty(torch.int64)
    if rows.count:
        held, stride = (tokens, 0) if parameters is None else (parameters, parameters.stride(0))
        pick_kernel[(rows.count,)](
            held, likeliest.score, likeliest.token, drawn.score, drawn.token, tokens, stride, rows.num_slices,
            parameters is None, rows.padded_slices, num_warps=1,
        )  # fmt: skip
    return tokens


@triton.jit
def draw_kernel(
    logits: tl.tensor,
    parameters: tl.tensor,
    highest: tl.tensor,
    limits: tl.tensor,
    score: tl.tensor,
    token: tl.tensor,
    vocabulary: int,
    logits_stride: int,
    parameters_stride: int,
    num_slices: int,
    size: tl.constexpr,
    tile: tl.constexpr,
    padded_slices: tl.constexpr,
) -> None:
    """The token of a slice with the largest sum of scaled logit and noise, among those with keys up to the limit."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = read_float(parameters, TEMPERATURE, parameters_stride, row)
    if temperature > 0.0:
        likeliest = row_maximum(highest, row, num_slices, padded_slices)
        limit = tl.minimum(tl.load(limits + row), _HOPELESS)
        best = tl.full([], float("-inf"), tl.float32)
        best_token = part * size
        for at in range(part * size, tl.minimum((part + 1) * size, vocabulary), tile):
            candidate = at + tl.arange(0, tile)
            x = tl.load(logits + row * logits_stride + candidate, mask=candidate < vocabulary, other=float("-inf"))
            keys = keys_of(x.to(tl.float32), likeliest, temperature)
            if tl.min(keys, axis=0) <= limit:
                words = random_words(
                    (at // 4 + tl.arange(0, tile // 4)).to(tl.uint32),
                    read_int(parameters, OUTPUT_INDEX, parameters_stride, row).to(tl.uint32, bitcast=True),
                    read_int(parameters, SEQUENCE_INDEX, parameters_stride, row).to(tl.uint32, bitcast=True),
                    read_int(parameters, SEED_LOW, parameters_stride, row).to(tl.uint32, bitcast=True),
                    read_int(parameters, SEED_HIGH, parameters_stride, row).to(tl.uint32, bitcast=True),
                )
                scores = tl.where(keys <= limit, gumbel_noise(words) - distances_of(keys), float("-inf"))
                most, place = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
                best_token = tl.where(most > best, at + place, best_token)
                best = tl.maximum(best, most)
        tl.store(score + row * num_slices + part, best)
        tl.store(token + row * num_slices + part, best_token)


@triton.jit
def pick_kernel(
    parameters: tl.tensor,
    likeliest_score: tl.tensor,
    likeliest_token: tl.tensor,
    drawn_score: tl.tensor,
    drawn_token: tl.tensor,
    tokens: tl.tensor,
    parameters_stride: int,
    num_slices: int,
    greedy: tl.constexpr,
    padded_slices: tl.constexpr,
) -> None:
    """The best token of a row's slices, the first of equals; `greedy`: of all rows the likeliest, without parameters."""
    row = tl.program_id(0).to(tl.int64)
    score, token = likeliest_score, likeliest_token
    if not greedy:
        drawn = read_float(parameters, TEMPERATURE, parameters_stride, row) > 0.0
        score = tl.where(drawn, drawn_score, likeliest_score)
        token = tl.where(drawn, drawn_token, likeliest_token)
    part = tl.arange(0, padded_slices)
    inside = part < num_slices
    scores = tl.load(score + row * num_slices + part, mask=inside, other=float("-inf"))
    _, first = tl.max(scores, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(tokens + row, tl.load(token + row * num_slices + first).to(tl.int64))
