"""What the attention kernels are told of a step, as int32 tensors in one run of memory, so that one copy brings all of it.

A launch depends on `StepSizes` alone: a CUDA graph that was captured over a `StepTensors` serves every step that fits the
same sizes, once its memory has been written anew. `upload` does it for a step that runs once. For a graph:

    sizes = decode_sizes(bucket, max_blocks, block_size, aim)         # aim = part_aim(kv_heads, processors)
    words = torch.zeros(sizes.num_words, dtype=torch.int32, device=device)
    attention = TritonAttention(kv, StepTensors.over(words, sizes))  # what is captured
    pinned = torch.zeros(sizes.num_words, dtype=torch.int32, pin_memory=True)
    write_rows(StepTensors.over(pinned, sizes), rows, block_size, aim)       # every step
    words.copy_(pinned, non_blocking=True)                            # `pinned` must rest until the copy is done

Never waits for a device. Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InternalError
from ..batch import RowSpan

PART_TOKENS = 128  # the least context that is worth a program of its own
PROGRAMS_PER_PROCESSOR = 3  # of the decode kernel, as their shared memory allows
WAVES = 4  # of programs over the device: the last, partly filled one then costs little
ALIGNMENT = 4  # words. Triton compiles another kernel for pointers that are not at multiples of 16 bytes
TABLE_ALIGNMENT = 16  # blocks, for the same reason: the stride of the tables is an argument


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What the launches of a step depend on.

    num_tokens    T, packed tokens
    num_decode    rows of one token each; they stand before the others
    num_prefill   rows of any number of tokens
    max_blocks    B, the width of the block tables; a multiple of TABLE_ALIGNMENT
    num_parts     P, room for the parts into which the contexts of decode rows are split; as many as decode rows exactly when
                  each of them has one
    """

    num_tokens: int
    num_decode: int
    num_prefill: int
    max_blocks: int
    num_parts: int

    @property
    def num_rows(self) -> int:
        return self.num_decode + self.num_prefill

    @property
    def num_words(self) -> int:
        """Length of the int32 tensor that holds a `StepTensors`."""
        return sum(_aligned(size) for size in self.section_words)

    @property
    def section_words(self) -> tuple[int, ...]:
        """Words of each tensor of a `StepTensors`, in order."""
        rows = self.num_rows
        return rows * self.max_blocks, rows, rows, rows, self.num_tokens, 2 * self.num_parts, self.num_decode + 1


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step's rows, decode rows first; all int32, on one device. S is the pool's block size.

    block_tables  [R, B], blocks of each row in order; what stands behind those of positions [0, length) is never read
    starts        [R], position of a row's first token
    lengths       [R], tokens in the cache after the step, start + tokens fed; 0 marks a row that is only padding
    offsets       [R], a row's first packed token; ascending among the others than decode rows. A padding row among the decode
                  rows has a packed token of its own, whose output becomes 0, or -1 for none
    slots         [T], where a token's keys and values go, block * S + slot; -1 for a padding token, which is not stored
    parts         [P, 2], a decode row and which of its parts; row -1 behind the last one
    first_parts   [num_decode + 1], where each decode row's parts begin; the last is the number of parts
    """

    sizes: StepSizes
    block_tables: Tensor
    starts: Tensor
    lengths: Tensor
    offsets: Tensor
    slots: Tensor
    parts: Tensor
    first_parts: Tensor

    @classmethod
    def over(cls, words: Tensor, sizes: StepSizes) -> StepTensors:
        """Views of an int32 tensor [sizes.num_words]."""
        if words.dtype != torch.int32 or words.shape != (sizes.num_words,):
            raise InternalError(f"step tensors need int32 [{sizes.num_words}], got {words.dtype} {list(words.shape)}")
        views, at = [], 0
        for size in sizes.section_words:
            views.append(words[at : at + size])
            at += _aligned(size)
        tables, starts, lengths, offsets, slots, parts, first_parts = views
        tables, parts = tables.view(sizes.num_rows, sizes.max_blocks), parts.view(sizes.num_parts, 2)
        return cls(sizes, tables, starts, lengths, offsets, slots, parts, first_parts)


def part_aim(num_kv_heads: int, num_processors: int) -> int:
    """How many parts, times KV heads, fill a device of so many streaming multiprocessors."""
    return -(-num_processors * PROGRAMS_PER_PROCESSOR * WAVES // num_kv_heads)


def decode_sizes(num_rows: int, max_blocks: int, block_size: int, aim: int) -> StepSizes:
    """Room for any `num_rows` decode rows or fewer, of up to `max_blocks` blocks, see `part_aim`."""
    width = _table_width(max_blocks)
    longest = -(-max_blocks * block_size // PART_TOKENS)  # parts that one row can have
    num_parts = max(num_rows + 1, min(aim + num_rows, num_rows * longest))
    return StepSizes(num_rows, num_rows, 0, width, num_parts)


def exact_sizes(rows: Sequence[RowSpan], aim: int) -> StepSizes:
    """Room for these rows and no more."""
    num_decode = sum(row.num_tokens == 1 for row in rows)
    width = _table_width(max((len(row.block_table) for row in rows), default=1))
    num_parts = int(_parts_of(np.array([row.end for row in rows if row.num_tokens == 1], np.int64), aim).sum())
    return StepSizes(sum(row.num_tokens for row in rows), num_decode, len(rows) - num_decode, width, num_parts)


def write_rows(target: StepTensors, rows: Sequence[RowSpan], block_size: int, aim: int) -> None:
    """Describe `rows` in tensors of the CPU; decode rows that are missing to the target's sizes become padding.

    Raises InternalError when the rows do not fit. Rows of one token must all fit among the decode rows.
    """
    sizes = target.sizes
    decode = [row for row in rows if row.num_tokens == 1]
    prefill = [row for row in rows if row.num_tokens != 1]
    used = sum(row.num_tokens for row in rows)
    widest = max((len(row.block_table) for row in rows), default=0)
    if used > sizes.num_tokens or len(decode) > sizes.num_decode or len(prefill) > sizes.num_prefill or widest > sizes.max_blocks:
        raise InternalError(
            f"{len(decode)} decode and {len(prefill)} prefill rows of {used} tokens and up to {widest} blocks do not fit {sizes}"
        )
    tables = _array(target.block_tables)
    starts, lengths, offsets = (_array(part) for part in (target.starts, target.lengths, target.offsets))
    slots = _array(target.slots)
    starts[:], lengths[:], slots[:] = 0, 0, -1
    offsets[: sizes.num_decode], offsets[sizes.num_decode :] = -1, used
    for first, part in ((0, decode), (sizes.num_decode, prefill)):
        for i, row in enumerate(part, first):
            tables[i, : len(row.block_table)] = row.block_table
        span = slice(first, first + len(part))
        starts[span] = [row.start for row in part]
        lengths[span] = [row.end for row in part]
        offsets[span] = [row.offset for row in part]
    here = slice(0, len(decode))
    blocks = tables[np.arange(len(decode)), starts[here] // block_size]
    slots[offsets[here]] = blocks * block_size + starts[here] % block_size
    for i, row in enumerate(prefill, sizes.num_decode):
        positions = np.arange(row.start, row.end)
        slots[row.offset : row.offset + row.num_tokens] = tables[i, positions // block_size] * block_size + positions % block_size
    padding = np.arange(used, min(sizes.num_tokens, used + sizes.num_decode - len(decode)))
    offsets[len(decode) : len(decode) + len(padding)] = padding
    _write_parts(target, lengths[: sizes.num_decode], aim)


def upload(rows: Sequence[RowSpan], block_size: int, aim: int, device: torch.device) -> StepTensors:
    """The tensors of a step that runs once, on its device by one copy that nobody waits for."""
    sizes = exact_sizes(rows, aim)
    on_cuda = device.type == "cuda"
    host = torch.zeros(sizes.num_words, dtype=torch.int32, pin_memory=on_cuda)
    write_rows(StepTensors.over(host, sizes), rows, block_size, aim)
    # torch keeps pinned memory from reuse until the copies from it are done.
    return StepTensors.over(host.to(device, non_blocking=True) if on_cuda else host, sizes)


def _write_parts(target: StepTensors, lengths: NDArray[np.int32], aim: int) -> None:
    counts = _parts_of(lengths, aim)
    total = int(counts.sum())
    if total > target.sizes.num_parts:
        raise InternalError(f"{total} parts do not fit {target.sizes}; were the sizes made with the same aim, {aim}?")
    first_parts, parts = _array(target.first_parts), _array(target.parts)
    first_parts[0] = 0
    first_parts[1:] = np.cumsum(counts)
    parts[:total, 0] = np.repeat(np.arange(len(counts)), counts)
    parts[:total, 1] = np.arange(total) - np.repeat(first_parts[:-1], counts)
    parts[total:] = -1


def _parts_of(lengths: NDArray[np.int32] | NDArray[np.int64], aim: int) -> NDArray[np.int64]:
    """Parts of each row [R], so that all are about equally long and at most aim + R, as in flash-decoding (Dao et al. 2023)."""
    total = int(lengths.sum(dtype=np.int64))
    longest = max(PART_TOKENS, -(-total // aim))
    return -(-lengths.astype(np.int64) // longest)


def _array(tensor: Tensor) -> NDArray[np.int32]:
    """The memory of an int32 tensor of the CPU."""
    array: NDArray[np.int32] = tensor.numpy()
    return array


def _aligned(words: int) -> int:
    return -(-words // ALIGNMENT) * ALIGNMENT


def _table_width(num_blocks: int) -> int:
    return -(-max(1, num_blocks) // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
