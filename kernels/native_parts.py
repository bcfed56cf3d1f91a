"""What the native kernels make of a model and of a step: packed linears, attention over the cache, stacks of layers.

Everything here holds the memory that it gives the library pointers into.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from ..core.errors import InternalError
from .batch import AttentionSpec, RowSpan
from .interface import LayerParts, PagedAttention, Turn
from .native_abi import GATES, PANEL, TYPES, Buffers, DecoderLayer, Layer, Row, Stack, Step, Threads, Turns, Weight

HUGE_PAGE, CHUNK_BYTES = 2 << 20, 64 << 20
LINE_WORDS = 16


class NativeLinear:
    """y = x W' + b over panels of 64 outputs."""

    def __init__(
        self,
        library: ctypes.CDLL,
        threads: Threads,
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
        self.weight = Weight(self._at, self._bias_at, self._inputs, self._outputs)  # as other kernels are told of it

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

    def __init__(self, library: ctypes.CDLL, threads: Threads, kv: Tensor, rows: Sequence[RowSpan], most_in_place: int) -> None:
        _, num_layers, _, kv_heads, block_size, head_dim = kv.shape
        kind = TYPES[kv.dtype]
        self._call = library.baton_attention
        self._kept = kv, threads  # the library has pointers into them
        self._kv_heads, self._head_dim = kv_heads, head_dim
        self._rows = (Row * len(rows))()
        tables, words = array("i"), 0
        for at, row in zip(self._rows, rows, strict=True):
            at.offset, at.num_tokens, at.start, at.table, at.packed = row.offset, row.num_tokens, row.start, len(tables), -1
            tables.extend(row.block_table)
            if row.num_tokens > most_in_place:
                at.packed = words
                words += library.baton_packed_row_words(kind, row.end, kv_heads, head_dim)
        self._tables = tables
        self._scratch = torch.empty(words, dtype=torch.int32)
        self.step = Step(
            threads.handle, kv.data_ptr(), ctypes.addressof(self._rows), tables.buffer_info()[0], self._scratch.data_ptr(),
            len(rows), num_layers, kv_heads, block_size, head_dim, kind,
        )  # fmt: skip
        self._layer = Layer()

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
        self._call(byref(self.step), byref(at))
        return out


class NativeStack:
    """Decoder layers in one call. `layers` must be such as `runs_in_one_go`."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[LayerParts], eps: float) -> None:
        self._call = library.baton_stack
        self._kept = tuple(layers)
        self._layers = (DecoderLayer * len(layers))(*(_described(parts) for parts in layers))
        self._stack = Stack(ctypes.addressof(self._layers), len(layers), layers[0].next_norm.shape[0], eps)
        self._inner = max(layer.down.inputs for layer in self._layers)
        self._mixed = max(layer.output.inputs for layer in self._layers)
        self._qkv = max(layer.qkv.outputs for layer in self._layers)

    def run(self, x: Tensor, normed: Tensor, attention: PagedAttention, turns: Sequence[Turn | None]) -> None:
        """See `interface.LayerStack`."""
        if not isinstance(attention, NativeAttention) or not (x.is_contiguous() and normed.is_contiguous()):
            raise InternalError("native layers need native attention, and x and its norm row by row in memory")
        tokens = x.shape[0]
        qkv, mixed, inner = (x.new_empty((tokens, width)) for width in (self._qkv, self._mixed, self._inner))
        tables = [None if turn is None else [part.to(x.dtype).contiguous() for part in turn] for turn in turns]
        pointers = (Turns * len(tables))(*(Turns(*(part.data_ptr() for part in table or ())) for table in tables))
        buffers = Buffers(*(tensor.data_ptr() for tensor in (x, normed, qkv, mixed, inner)), tokens)
        self._call(byref(self._stack), byref(attention.step), pointers, byref(buffers))


def runs_in_one_go(parts: LayerParts) -> bool:
    """Whether a layer is made of what `NativeStack` can run."""
    linears = (parts.qkv, parts.output, parts.gate_up, parts.down)
    inner = parts.down.weight.inputs if isinstance(parts.down, NativeLinear) else 0
    return all(isinstance(linear, NativeLinear) for linear in linears) and inner % PANEL == 0 and parts.activation in GATES


def _described(parts: LayerParts) -> DecoderLayer:
    weights = [
        linear.weight for linear in (parts.qkv, parts.output, parts.gate_up, parts.down) if isinstance(linear, NativeLinear)
    ]
    head_norms = (None, None) if parts.head_norms is None else [weight.data_ptr() for weight in parts.head_norms]
    spec = parts.spec
    return DecoderLayer(
        *weights, *head_norms, parts.mlp_norm.data_ptr(), parts.next_norm.data_ptr(),
        weights[1].inputs // parts.head_dim, spec.window or 0, spec.scale, spec.softcap or 0.0, parts.turn,
        GATES[parts.activation],
    )  # fmt: skip


class WeightMemory:
    """Memory for packed weights, one behind the other in huge pages where the system gives them: through small ones reading is
    slower, and a weight in pages of its own gets few huge ones, since most are neither large enough nor aligned."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.int32)  # what is left of the last mapping

    def take(self, words: int) -> Tensor:
        """int32 [words], at the beginning of a cache line; all zero."""
        if self._free.numel() < words:
            self._free = _huge_pages(max(4 * words, CHUNK_BYTES))
        taken, self._free = self._free[:words], self._free[-(-words // LINE_WORDS) * LINE_WORDS :]
        return taken


def _huge_pages(num_bytes: int) -> Tensor:
    """int32 over whole and aligned huge pages. What is never written to takes no memory."""
    num_bytes = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.int32)
    skipped = -whole.data_ptr() % HUGE_PAGE // 4
    return whole[skipped : skipped + num_bytes // 4]
