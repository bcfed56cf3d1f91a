"""How rows are sampled, in one int32 tensor: one copy sends all of a step's rows to a device, and what was recorded over it
draws with whatever it holds by then. Needs no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InternalError
from .batch import DrawSpec

# Rows of the tensor; floats stand there as their bits.
TEMPERATURE = 0  # float32, 0 is greedy
TOP_K = 1  # 0 keeps all
TOP_P = 2  # float32, 1 keeps all
REACH = 3  # float32, -log(min_p): how far below the likeliest a scaled logit may lie; infinity keeps all
SEED_LOW = 4  # 32 bits each
SEED_HIGH = 5
SEQUENCE_INDEX = 6
OUTPUT_INDEX = 7
NUM_FIELDS = 8

_FLOATS = [TEMPERATURE, TOP_P, REACH]
_COUNTS = [TOP_K, SEED_LOW, SEED_HIGH, SEQUENCE_INDEX, OUTPUT_INDEX]


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
    made[_FLOATS, : len(specs)] = np.array(reals, dtype=np.float32).T.view(np.int32)
    counts = [(spec.top_k, spec.seed & 0xFFFFFFFF, spec.seed >> 32, spec.sequence_index, spec.output_index) for spec in specs]
    made[_COUNTS, : len(specs)] = np.array(counts, dtype=np.int64).astype(np.uint32).T.view(np.int32)
    return out


def unpack(words: Tensor) -> list[DrawSpec]:
    """The inverse of `pack`, as exact as float32 is: int32 [NUM_FIELDS, R] on the CPU -> R specs."""
    reals = words[_FLOATS].view(torch.float32).T.tolist()
    counts = (words[_COUNTS].long() & 0xFFFFFFFF).T.tolist()
    return [
        DrawSpec(temperature, top_k, top_p, math.exp(-reach), low | high << 32, sequence_index, output_index)
        for (temperature, top_p, reach), (top_k, low, high, sequence_index, output_index) in zip(reals, counts, strict=True)
    ]
