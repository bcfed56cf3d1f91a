"""The CPU's twin of kernels that take everything from tensors: they read the tensors and call the plain kernels.

So whatever replays recorded steps on a GPU runs on a machine without one, for tests and for trying things out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from . import reference
from .batch import AttentionSpec, DrawSpec, RowSpan
from .draw_words import unpack
from .interface import PagedAttention, Turn
from .triton.step_tensors import StepTensors


class TwinAttention:
    """A step's attention by `attention`, whose rows stand in tensors; see `interface.PagedAttention`. Reads them at every run."""

    def __init__(self, attention: Callable[[Tensor, Sequence[RowSpan]], PagedAttention], kv: Tensor, step: StepTensors) -> None:
        self._attention = attention
        self._kv = kv  # [N, L, 2, K, S, D]
        self._step = step

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: Turn | None) -> Tensor:
        """qkv [T, H + 2K, D], turn cos and sin [T, D / 2] or None; returns [T, H * D], 0 for padding."""
        rows = self._rows()
        num_tokens = sum(row.num_tokens for row in rows)  # padding stands behind all rows
        heads = qkv.shape[1] - 2 * self._kv.shape[3]
        out = qkv.new_zeros((qkv.shape[0], heads * qkv.shape[2]))
        if rows:
            turned = None if turn is None else (turn[0][:num_tokens], turn[1][:num_tokens])
            out[:num_tokens] = self._attention(self._kv, rows).run(layer, qkv[:num_tokens], spec, turned)
        return out

    def _rows(self) -> list[RowSpan]:
        step, block_size = self._step, self._kv.shape[4]
        numbers = zip(step.offsets.tolist(), step.starts.tolist(), step.lengths.tolist(), step.block_tables.tolist(), strict=True)
        rows = [
            RowSpan(offset, length - start, start, tuple(table[: -(-length // block_size)]))
            for offset, start, length, table in numbers
            if length
        ]
        return sorted(rows, key=lambda row: row.offset)


def sample(draw: Callable[[Tensor, Sequence[DrawSpec]], Tensor], logits: Tensor, draws: Tensor) -> Tensor:
    """logits [R, V], draws int32 [NUM_FIELDS, R] -> int64 [R]: the argmax where the temperature is 0, else by `draw`."""
    specs = unpack(draws)
    drawn = [i for i, spec in enumerate(specs) if spec.temperature > 0]
    chosen = reference.argmax(logits)  # [R]
    if drawn:
        chosen[drawn] = draw(logits[drawn].float(), [specs[i] for i in drawn])
    return chosen
