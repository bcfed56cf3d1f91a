"""Rows of logits cut into slices of a fixed size, each the work of one program.

A single row fills the device, and what a row's programs find never depends on how many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError

SLICE = 4096  # tokens of a program
MAX_VOCABULARY = 1 << 22  # tokens are counted in float32, and the slices of a row are reduced by one program


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits [R, V] and how they are shared out."""

    logits: Tensor
    count: int
    vocabulary: int
    num_slices: int

    @classmethod
    def of(cls, logits: Tensor) -> Rows:
        """Raises InternalError for logits that are no rows of numbers, or not contiguous."""
        if logits.dim() != 2 or not logits.is_floating_point() or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
            raise InternalError(
                f"sampling needs numbers [R, V] with V from 1 to {MAX_VOCABULARY}, not {logits.dtype} {list(logits.shape)}"
            )
        if logits.stride(1) != 1:
            raise InternalError(f"sampling needs rows whose logits are contiguous, not {logits.stride(1)} apart")
        count, vocabulary = logits.shape
        return cls(logits, count, vocabulary, triton.cdiv(vocabulary, SLICE))

    @property
    def grid(self) -> tuple[int, int]:
        return self.count, self.num_slices

    @property
    def padded_slices(self) -> int:
        """The power of 2 that holds a row's slices."""
        return int(triton.next_power_of_2(self.num_slices))

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Of every row, on the device."""
        return torch.empty((self.count, *shape), dtype=dtype, device=self.logits.device)


@dataclass(frozen=True, slots=True)
class Best:
    """The best token of each slice and its score: int32 and float32 [R, slices]."""

    score: Tensor
    token: Tensor

    @classmethod
    def empty(cls, rows: Rows) -> Best:
        return cls(rows.empty(torch.float32, rows.num_slices), rows.empty(torch.int32, rows.num_slices))


def summarise(rows: Rows) -> Best:
    """The likeliest token of each slice, the lowest of equals, and its logit."""
    best = Best.empty(rows)
    if rows.count:
        summarise_kernel[rows.grid](
            rows.logits, best.score, best.token, rows.vocabulary, rows.logits.stride(0), rows.num_slices, SLICE, num_warps=8
        )
    return best


@triton.jit
def summarise_kernel(
    logits: tl.tensor,
    score: tl.tensor,
    token: tl.tensor,
    vocabulary: int,
    logits_stride: int,
    num_slices: int,
    size: tl.constexpr,
) -> None:
    """The largest logit of a slice and the lowest of its tokens."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    candidate = part * size + tl.arange(0, size)
    x = tl.load(logits + row * logits_stride + candidate, mask=candidate < vocabulary, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("-inf"))  # NaN is impossible
    most, place = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score + row * num_slices + part, most)
    tl.store(token + row * num_slices + part, part * size + place)


@triton.jit
def row_maximum(highest: tl.tensor, row: tl.tensor, num_slices: int, padded_slices: tl.constexpr) -> tl.tensor:
    """The largest logit of a row, of those of its slices, highest [R, slices]."""
    part = tl.arange(0, padded_slices)
    return tl.max(tl.load(highest + row * num_slices + part, mask=part < num_slices, other=float("-inf")), axis=0)
