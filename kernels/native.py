"""Kernels in C++ for the CPU: packed linear layers, attention over the paged cache in place, fused norms.

What they gain over `cpu`, and why, stands in benchmarks/NOTES.md. float32 and bfloat16 are theirs; tensors of other
types, and linears that cannot be packed, take the way of `cpu`. Their results do not depend on the batch; with
`deterministic`, a token's result does not depend on whether it was prefilled or decoded either.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .batch import DrawSpec, RowSpan
from .interface import LayerParts
from .native_abi import TYPES, Draw, Threads, declare
from .native_build import build_native, processor_flags
from .native_parts import NativeAttention, NativeLinear, NativeStack, WeightMemory, runs_in_one_go
from .reference import argmax

LARGEST_HEAD = {torch.float32: 256, torch.bfloat16: 512}  # head dimensions that fit the registers of decode attention
MOST_IN_PLACE = 1  # tokens of a row that is attended in place
LARGEST_CACHED = 96 << 20  # bytes of packed weights that may still be in a cache when the next step reads them


class NativeLibrary:
    """The compiled library and threads for it. One executor's thread calls it, nobody else.

    Raises Unavailable when it can neither be found nor compiled.
    """

    def __init__(
        self, threads: int, deterministic: bool = False, architecture: str = "native", options: tuple[str, ...] = ()
    ) -> None:
        # CDLL lets other Python threads run during a call.
        self._library = ctypes.CDLL(str(build_native(architecture, options)))
        self.deterministic = deterministic
        declare(self._library)
        self._num_threads = max(1, threads)
        self._threads = Threads(self._library, self._num_threads)
        self._pool = self._threads.handle
        self._memory, self._packed_bytes = WeightMemory(), 0
        # oneDNN's AMX tiles beat everything that can be done with vectors, and half precision without dot products is
        # best left to it, too. A packed linear is the only one whose results never depend on the batch.
        features = self._library.baton_features()
        amx = "amx_bf16" in processor_flags()
        self._packs = {
            torch.float32: features >= 1 or deterministic,
            torch.bfloat16: (features == 2 and not amx) or deterministic,
        }

    def linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear | cpu.CpuLinear:
        """Pack a weight [outputs, inputs]."""
        kind, (outputs, inputs) = TYPES.get(weight.dtype), weight.shape
        if kind is None or not self._packs[weight.dtype]:
            return cpu.CpuLinear(weight, bias)
        words = self._library.baton_packed_words(kind, outputs, inputs)
        if words == 0:
            return cpu.CpuLinear(weight, bias)
        packed = self._memory.take(words)
        self._packed_bytes += 4 * words
        if self._packed_bytes > LARGEST_CACHED and self._num_threads > 1:  # one thread alone gains nothing by it
            self._library.baton_pool_stream(self._pool)
        self._library.baton_pack(kind, weight.contiguous().data_ptr(), outputs, inputs, packed.data_ptr())
        return NativeLinear(self._library, self._threads, packed, (outputs, inputs), bias, weight.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., E], weight [E] -> [..., E]."""
        kind = TYPES.get(x.dtype)
        if kind is None:
            return cpu.rms_norm(x, weight, eps)
        size = x.shape[-1]
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.baton_rms_norm(
            self._pool, kind, x.data_ptr(), size, None, weight.data_ptr(), eps, x.numel() // size, size, None, out.data_ptr()
        )
        return out

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x, delta [T, E] -> x + delta and its norm, both [T, E]."""
        kind = TYPES.get(x.dtype)
        if kind is None:
            return cpu.add_rms_norm(x, delta, weight, eps)
        x, delta = x.contiguous(), delta.contiguous()
        tokens, size = x.shape
        total, out = torch.empty_like(x), torch.empty_like(x)
        pointers = total.data_ptr(), out.data_ptr()
        self._library.baton_rms_norm(
            self._pool, kind, x.data_ptr(), size, delta.data_ptr(), weight.data_ptr(), eps, tokens, size, *pointers
        )
        return total, out

    def attention(self, kv: Tensor, rows: Sequence[RowSpan]) -> NativeAttention | cpu.CpuAttention:
        """Attention of one step over the pool kv[N, L, 2, K, S, D]."""
        if not _attends(kv.dtype, kv.shape[-1]):
            return cpu.CpuAttention(kv, rows)
        return NativeAttention(self._library, self._threads, kv, rows, 0 if self.deterministic else MOST_IN_PLACE)

    def argmax(self, logits: Tensor) -> Tensor:
        """The likeliest token of every row, the lowest of equals: [R, V] -> int64 [R]."""
        kind = TYPES.get(logits.dtype)
        if kind is None:
            return argmax(logits)
        logits = logits.contiguous()
        count, vocabulary = logits.shape
        tokens = torch.empty(count, dtype=torch.int64)
        self._library.baton_argmax(self._pool, kind, logits.data_ptr(), count, vocabulary, tokens.data_ptr())
        return tokens

    def stack(self, layers: Sequence[LayerParts], eps: float) -> NativeStack | None:
        """Decoder layers in one call, where all of them are made of native parts; see `table.Kernels`."""
        if not all(runs_in_one_go(parts) and _attends(parts.next_norm.dtype, parts.head_dim) for parts in layers):
            return None
        return NativeStack(self._library, layers, eps)

    def draw(self, logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
        """A token for every row: float32 [R, V] -> int64 [R]; see `reference.draw`."""
        logits = logits.contiguous()
        count, vocabulary = logits.shape
        how = (Draw * count)()
        for at, spec in zip(how, specs, strict=True):
            at.seed, at.sequence_index, at.output_index = spec.seed, spec.sequence_index, spec.output_index
            at.temperature, at.top_k, at.top_p, at.min_p = spec.temperature, spec.top_k, spec.top_p, spec.min_p
        tokens = torch.empty(count, dtype=torch.int64)
        self._library.baton_draw(self._pool, logits.data_ptr(), count, vocabulary, how, tokens.data_ptr())
        return tokens


def _attends(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the native attention takes such a cache."""
    return dtype in TYPES and head_dim <= LARGEST_HEAD[dtype] and head_dim % 2 == 0
