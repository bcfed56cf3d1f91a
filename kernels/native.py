"""Kernels in C++ for the CPU: packed linear layers, attention over the paged cache in place, fused norms.

What they gain over `cpu`, and why, stands in benchmarks/NOTES.md. float32 and bfloat16 are theirs; tensors of other
types, and linears that cannot be packed, take the way of `cpu`. Their results do not depend on the batch; with
`deterministic`, a token's result does not depend on whether it was prefilled or decoded either.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from . import cpu
from .batch import AttentionSpec, DrawSpec, RowSpan
from .native_build import build_native, processor_flags
from .reference import argmax

TYPES = {torch.float32: 0, torch.bfloat16: 1}
LARGEST_HEAD = {torch.float32: 256, torch.bfloat16: 512}  # head dimensions that fit the registers of decode attention
PANEL = 64  # outputs that are packed together
GATES = {"silu": 0, "gelu_tanh": 1}
MOST_IN_PLACE = 1  # tokens of a row that is attended in place


class _Row(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("offset", "num_tokens", "start", "table", "packed")]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("pool", "kv", "rows", "tables", "scratch")),
        *((name, c_int64) for name in ("num_rows", "num_layers", "kv_heads", "block_size", "head_dim")),
        ("type", c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layer", "heads")),
        *((name, c_void_p) for name in ("qkv", "cosine", "sine", "out")),
        ("window", c_int64),
        *((name, c_float) for name in ("scale", "softcap")),
    ]


class _Threads:
    """A pool of threads inside the library, ended with the last object that uses it."""

    def __init__(self, library: ctypes.CDLL, count: int) -> None:
        self._destroy = library.baton_pool_destroy
        self.handle = c_void_p(library.baton_pool_create(count))

    def __del__(self) -> None:
        self._destroy(self.handle)


class _Draw(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("seed", "sequence_index", "output_index", "top_k")),
        *((name, c_float) for name in ("temperature", "top_p", "min_p")),
    ]


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
        _declare(self._library)
        self._threads = _Threads(self._library, max(1, threads))
        self._pool = self._threads.handle
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
        packed = _huge_pages(words)
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
        if kv.dtype not in TYPES or kv.shape[-1] > LARGEST_HEAD[kv.dtype] or kv.shape[-1] % 2:
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

    def draw(self, logits: Tensor, specs: Sequence[DrawSpec]) -> Tensor:
        """A token for every row: float32 [R, V] -> int64 [R]; see `reference.draw`."""
        logits = logits.contiguous()
        count, vocabulary = logits.shape
        how = (_Draw * count)()
        for at, spec in zip(how, specs, strict=True):
            at.seed, at.sequence_index, at.output_index = spec.seed, spec.sequence_index, spec.output_index
            at.temperature, at.top_k, at.top_p, at.min_p = spec.temperature, spec.top_k, spec.top_p, spec.min_p
        tokens = torch.empty(count, dtype=torch.int64)
        self._library.baton_draw(self._pool, logits.data_ptr(), count, vocabulary, how, tokens.data_ptr())
        return tokens


class NativeLinear:
    """y = x W' + b over panels of 64 outputs."""

    def __init__(
        self,
        library: ctypes.CDLL,
        threads: _Threads,
        packed: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._call = library.baton_linear
        self._call_gated, self._gate = library.baton_gated_linear, library.baton_gated
        self._unpack = library.baton_unpack_rows
        self._threads = threads
        self._packed = packed  # int32 [words]
        self._at = packed.data_ptr()
        self._outputs, self._inputs = shape
        self._bias = None if bias is None else bias.to(dtype).contiguous()
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        self._dtype = dtype
        self._type = TYPES[dtype]

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, inputs] -> [T, outputs]."""
        x = x.contiguous()
        out = x.new_empty((x.shape[0], self._outputs))
        self._call(
            self._threads.handle,
            self._type,
            x.data_ptr(),
            x.shape[0],
            self._at,
            self._inputs,
            self._outputs,
            self._bias_at,
            out.data_ptr(),
        )
        return out

    def gated(self, activation: str, x: Tensor) -> Tensor:
        """x [T, inputs] -> [T, outputs / 2]; one call where both halves are whole panels."""
        x = x.contiguous()
        tokens, inner, gate = x.shape[0], self._outputs // 2, GATES[activation]
        out = x.new_empty((tokens, inner))
        pool, kind = self._threads.handle, self._type
        if inner % PANEL:
            gate_up = self(x)
            self._gate(pool, kind, gate, gate_up.data_ptr(), tokens, inner, out.data_ptr())
            return out
        self._call_gated(
            pool, kind, gate, x.data_ptr(), tokens, self._at, self._inputs, inner, self._bias_at, out.data_ptr()
        )  # fmt: skip
        return out

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight: index int64 [T] -> [T, inputs]."""
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self._outputs:
            raise IndexError(f"row indices must lie in [0, {self._outputs})")
        index = index.contiguous()
        out = torch.empty((index.shape[0], self._inputs), dtype=self._dtype)
        self._unpack(self._type, self._at, self._inputs, index.data_ptr(), index.shape[0], out.data_ptr())
        return out


class NativeAttention:
    """Writes and attends for one step; what the rows say is laid out once for all layers.

    most_in_place  rows of at most so many tokens are attended in place
    """

    def __init__(self, library: ctypes.CDLL, threads: _Threads, kv: Tensor, rows: Sequence[RowSpan], most_in_place: int) -> None:
        _, num_layers, _, kv_heads, block_size, head_dim = kv.shape
        kind = TYPES[kv.dtype]
        self._call = library.baton_attention
        self._kept = kv, threads  # the library has pointers into them
        self._kv_heads, self._head_dim = kv_heads, head_dim
        self._rows = (_Row * len(rows))()
        tables, words = array("i"), 0
        for at, row in zip(self._rows, rows, strict=True):
            at.offset, at.num_tokens, at.start, at.table, at.packed = row.offset, row.num_tokens, row.start, len(tables), -1
            tables.extend(row.block_table)
            if row.num_tokens > most_in_place:
                at.packed = words
                words += library.baton_packed_row_words(kind, row.end, kv_heads, head_dim)
        self._tables = tables
        self._scratch = torch.empty(words, dtype=torch.int32)
        self._step = _Step(
            threads.handle, kv.data_ptr(), ctypes.addressof(self._rows), tables.buffer_info()[0], self._scratch.data_ptr(),
            len(rows), num_layers, kv_heads, block_size, head_dim, kind,
        )  # fmt: skip
        self._layer = _Layer()

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `table.PagedAttention`."""
        qkv = qkv.contiguous()
        heads = qkv.shape[1] - 2 * self._kv_heads
        out = qkv.new_empty((qkv.shape[0], heads * self._head_dim))
        cosine, sine = (None, None) if turn is None else (part.to(qkv.dtype).contiguous() for part in turn)
        at = self._layer
        at.layer, at.heads, at.qkv, at.out = layer, heads, qkv.data_ptr(), out.data_ptr()
        at.cosine, at.sine = (None, None) if cosine is None or sine is None else (cosine.data_ptr(), sine.data_ptr())
        at.window, at.scale, at.softcap = spec.window or 0, spec.scale, spec.softcap or 0.0
        self._call(byref(self._step), byref(at))
        return out


def _huge_pages(words: int) -> Tensor:
    """int32 [words] in huge pages where the system gives them: reading weights through small ones is a fifth slower."""
    memory = mmap.mmap(-1, 4 * words, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32, count=words)


def _declare(library: ctypes.CDLL) -> None:
    """The signatures of csrc/native.h."""
    library.baton_features.restype = c_int32
    library.baton_features.argtypes = []
    library.baton_pool_create.restype = c_void_p
    library.baton_pool_create.argtypes = [c_int32]
    library.baton_pool_destroy.restype = None
    library.baton_pool_destroy.argtypes = [c_void_p]
    library.baton_packed_words.restype = c_int64
    library.baton_packed_words.argtypes = [c_int32, c_int64, c_int64]
    library.baton_pack.restype = None
    library.baton_pack.argtypes = [c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_unpack_rows.restype = None
    library.baton_unpack_rows.argtypes = [c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p]
    library.baton_linear.restype = None
    library.baton_linear.argtypes = [c_void_p, c_int32, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p]
    library.baton_gated_linear.restype = None
    library.baton_gated_linear.argtypes = [
        c_void_p,
        c_int32,
        c_int32,
        c_void_p,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    ]
    library.baton_rms_norm.restype = None
    library.baton_rms_norm.argtypes = [
        c_void_p,
        c_int32,
        c_void_p,
        c_int64,
        c_void_p,
        c_void_p,
        c_float,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    ]
    library.baton_gated.restype = None
    library.baton_gated.argtypes = [c_void_p, c_int32, c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_packed_row_words.restype = c_int64
    library.baton_packed_row_words.argtypes = [c_int32, c_int64, c_int64, c_int64]
    library.baton_argmax.restype = None
    library.baton_argmax.argtypes = [c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p]
    library.baton_draw.restype = None
    library.baton_draw.argtypes = [c_void_p, c_void_p, c_int64, c_int64, POINTER(_Draw), c_void_p]
    library.baton_attention.restype = None
    library.baton_attention.argtypes = [POINTER(_Step), POINTER(_Layer)]
