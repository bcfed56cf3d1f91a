"""How rows are sampled, as the sampling kernels read it: one tensor, so that one copy sends all of a step's rows to the
device, and a CUDA graph that was captured over it draws with whatever it holds by then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError
from ..batch import DrawSpec

NUM_FIELDS = 8

# Rows of the tensor; floats stand there as their bits.
TEMPERATURE = tl.constexpr(0)  # float32, 0 is greedy
TOP_K = tl.constexpr(1)  # 0 keeps all
TOP_P = tl.constexpr(2)  # float32, 1 keeps all
REACH = tl.constexpr(3)  # float32, -log(min_p): how far below the likeliest a scaled logit may lie; infinity keeps all
SEED_LOW = tl.constexpr(4)  # 32 bits each
SEED_HIGH = tl.constexpr(5)
SEQUENCE_INDEX = tl.constexpr(6)
OUTPUT_INDEX = tl.constexpr(7)


def pack(specs: Sequence[DrawSpec], out: Tensor | None = None) -> Tensor:
    """int32 [NUM_FIELDS, R] on the CPU, a column for each spec; a temperature of 0 takes the argmax.

    out  where to write it, for instance pinned memory; columns behind the specs become greedy
    Raises InternalError for an `out` that cannot hold them.
    """
    if out is None:
        out = torch.empty((NUM_FIELDS, len(specs)), dtype=torch.int32)
    if out.dtype != torch.int32 or out.dim() != 2 or out.shape[0] != NUM_FIELDS or out.shape[1] < len(specs):
        raise InternalError(f"{len(specs)} specs need an int32 tensor [{NUM_FIELDS}, R], not {out.dtype} {list(out.shape)}")
    made = out.numpy()
    made[:, len(specs) :] = 0
    if not specs:
        return out
    reals = [(spec.temperature, spec.top_p, math.inf if spec.min_p <= 0 else -math.log(spec.min_p)) for spec in specs]
    made[[TEMPERATURE.value, TOP_P.value, REACH.value], : len(specs)] = np.array(reals, dtype=np.float32).T.view(np.int32)
    counts = [(spec.top_k, spec.seed & 0xFFFFFFFF, spec.seed >> 32, spec.sequence_index, spec.output_index) for spec in specs]
    words = np.array(counts, dtype=np.int64).astype(np.uint32).T.view(np.int32)
    made[[TOP_K.value, SEED_LOW.value, SEED_HIGH.value, SEQUENCE_INDEX.value, OUTPUT_INDEX.value], : len(specs)] = words
    return out


@triton.jit
def read_int(parameters: tl.tensor, field: tl.constexpr, stride: int, row: int) -> tl.tensor:
    """One row's value of an integer field."""
    return tl.load(parameters + field * stride + row)


@triton.jit
def read_float(parameters: tl.tensor, field: tl.constexpr, stride: int, row: int) -> tl.tensor:
    """One row's value of a float field."""
    return tl.load(parameters + field * stride + row).to(tl.float32, bitcast=True)
