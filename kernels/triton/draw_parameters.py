"""How the sampling kernels read one row of what `draw_words` packs."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import draw_words

TEMPERATURE = tl.constexpr(draw_words.TEMPERATURE)
TOP_K = tl.constexpr(draw_words.TOP_K)
TOP_P = tl.constexpr(draw_words.TOP_P)
REACH = tl.constexpr(draw_words.REACH)
SEED_LOW = tl.constexpr(draw_words.SEED_LOW)
SEED_HIGH = tl.constexpr(draw_words.SEED_HIGH)
SEQUENCE_INDEX = tl.constexpr(draw_words.SEQUENCE_INDEX)
OUTPUT_INDEX = tl.constexpr(draw_words.OUTPUT_INDEX)


@triton.jit
def read_int(parameters: tl.tensor, field: tl.constexpr, stride: int, row: int) -> tl.tensor:
    """One row's value of an integer field."""
    return tl.load(parameters + field * stride + row)


@triton.jit
def read_float(parameters: tl.tensor, field: tl.constexpr, stride: int, row: int) -> tl.tensor:
    """One row's value of a float field."""
    return tl.load(parameters + field * stride + row).to(tl.float32, bitcast=True)
