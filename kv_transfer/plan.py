"""Which bytes go where, when the two ends may be cut differently: tensor and pipeline ranks, block sizes.

Pure. A rank's pool is `kv[block, layer, 2, kv_head, slot, dim]`, contiguous in this order (`core.kv.KVLayout`),
so equal cuts need one run per contiguous stretch of blocks, and unequal ones the longest runs that both share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.errors import TransferRefused
from ..core.kv import KVLayout
from .transport import Copy


def plan_copies(
    source_layouts: Sequence[KVLayout],
    target_layouts: Sequence[KVLayout],
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    num_tokens: int,
    first_block: int = 0,
    num_blocks: int | None = None,
) -> list[Copy]:
    """The runs that move KV of one sequence into `target_blocks[first_block : first_block + num_blocks]`.

    Both block tables start at position 0 of the sequence and hold the same block ids on every rank of their
    end; the layouts are listed by rank. KV exists for the first `num_tokens` tokens only. With equal block
    sizes whole blocks are copied, the unused slots of the last one too, because that is one run instead of many.

    Raises TransferRefused when no copy can do it: another dtype, head size, or layers and heads that no source has.
    """
    _check_kinds(source_layouts, target_layouts)
    last_block = len(target_blocks) if num_blocks is None else first_block + num_blocks
    tables = _Tables(source_blocks, target_blocks, num_tokens, first_block, last_block)
    tables.check(source_layouts[0], target_layouts[0])
    copies: list[Copy] = []
    for target_rank, target in enumerate(target_layouts):
        for source_rank, part in _parts(source_layouts, target):
            runs = _runs(source_layouts[source_rank], target, part, tables)
            copies += [Copy(*run, source_rank, target_rank) for run in _merged(runs)]
    return copies


Run = tuple[int, int, int]  # source offset, target offset, number of bytes


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers [first_layer, last_layer) and heads [first_head, last_head), counted over the whole model."""

    first_layer: int
    last_layer: int
    first_head: int
    last_head: int

    def has_all_heads_of(self, layout: KVLayout) -> bool:
        return self.last_head - self.first_head == layout.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Tables:
    source_blocks: Sequence[int]
    target_blocks: Sequence[int]
    num_tokens: int
    first_block: int
    last_block: int

    def check(self, source: KVLayout, target: KVLayout) -> None:
        if not 0 <= self.first_block <= self.last_block <= len(self.target_blocks):
            raise TransferRefused(
                f"target blocks [{self.first_block}, {self.last_block}) are not within a table of {len(self.target_blocks)}"
            )
        end = min(self.num_tokens, self.last_block * target.block_size)
        if self.last_block > self.first_block and len(self.source_blocks) < source.num_blocks_for(end):
            need = source.num_blocks_for(end)
            raise TransferRefused(f"KV of {end} tokens lies in {need} source blocks, the table has {len(self.source_blocks)}")


def _check_kinds(sources: Sequence[KVLayout], targets: Sequence[KVLayout]) -> None:
    if not sources or not targets:
        raise TransferRefused("a copy plan needs the layout of at least one rank at each end")
    first = sources[0]
    for layout in (*sources, *targets):
        if layout.dtype != first.dtype:
            raise TransferRefused(f"KV of dtype {first.dtype} cannot be copied into a pool of dtype {layout.dtype}")
        if layout.head_dim != first.head_dim:
            raise TransferRefused(f"KV with head_dim {first.head_dim} cannot be copied into a pool with {layout.head_dim}")
    for ranks in (sources, targets):
        if len({layout.block_size for layout in ranks}) > 1:
            raise TransferRefused(f"ranks of one worker differ in block size: {[layout.block_size for layout in ranks]}")


def _parts(sources: Sequence[KVLayout], target: KVLayout) -> list[tuple[int, _Part]]:
    """Cut `target`'s layers and heads into rectangles that one source rank has. KV heads may be replicated at the source."""
    parts: list[tuple[int, _Part]] = []
    for layer in range(target.first_layer, target.first_layer + target.num_layers):
        head = target.first_head
        end = target.first_head + target.num_kv_heads
        while head < end:
            rank = _rank_with(sources, layer, head)
            stop = min(end, sources[rank].first_head + sources[rank].num_kv_heads)
            parts.append((rank, _Part(layer, layer + 1, head, stop)))
            head = stop
    return _stacked(parts)


def _rank_with(sources: Sequence[KVLayout], layer: int, head: int) -> int:
    for rank, source in enumerate(sources):
        in_layers = source.first_layer <= layer < source.first_layer + source.num_layers
        if in_layers and source.first_head <= head < source.first_head + source.num_kv_heads:
            return rank
    raise TransferRefused(f"no source rank has KV of layer {layer}, head {head}; the two ends serve different models")


def _stacked(parts: list[tuple[int, _Part]]) -> list[tuple[int, _Part]]:
    """Join rectangles of consecutive layers with the same source rank and heads."""
    stacks: dict[tuple[int, int, int], list[_Part]] = {}
    for rank, part in parts:
        stack = stacks.setdefault((rank, part.first_head, part.last_head), [])
        if stack and stack[-1].last_layer == part.first_layer:
            stack[-1] = _Part(stack[-1].first_layer, part.last_layer, part.first_head, part.last_head)
        else:
            stack.append(part)
    return [(rank, part) for (rank, _, _), stack in stacks.items() for part in stack]


def _runs(source: KVLayout, target: KVLayout, part: _Part, tables: _Tables) -> Iterator[Run]:
    """Runs for one rectangle, as long as both layouts allow without looking at neighbouring blocks."""
    if source.block_size != target.block_size:
        yield from _slot_runs(source, target, part, tables)
        return
    head_bytes = target.block_size * target.head_dim * target.item_bytes
    num_heads = part.last_head - part.first_head
    num_layers = part.last_layer - part.first_layer
    if part.has_all_heads_of(source) and part.has_all_heads_of(target):
        pieces = [(part.first_layer, 0, num_layers * 2 * num_heads * head_bytes)]
    else:
        layers = range(part.first_layer, part.last_layer)
        pieces = [(layer, side, num_heads * head_bytes) for layer in layers for side in (0, 1)]
    for index in range(tables.first_block, tables.last_block):
        from_block = tables.source_blocks[index] * source.block_bytes
        to_block = tables.target_blocks[index] * target.block_bytes
        for layer, side, num_bytes in pieces:
            yield (
                from_block + _offset(source, layer, side, part.first_head),
                to_block + _offset(target, layer, side, part.first_head),
                num_bytes,
            )


def _slot_runs(source: KVLayout, target: KVLayout, part: _Part, tables: _Tables) -> Iterator[Run]:
    """With unequal block sizes only the slots of one head within one block at both ends are contiguous."""
    slot_bytes = target.head_dim * target.item_bytes
    position = tables.first_block * target.block_size
    end = min(tables.num_tokens, tables.last_block * target.block_size)
    while position < end:
        to_next_block = min(source.block_size - position % source.block_size, target.block_size - position % target.block_size)
        num_slots = min(to_next_block, end - position)
        from_block = tables.source_blocks[position // source.block_size] * source.block_bytes
        to_block = tables.target_blocks[position // target.block_size] * target.block_bytes
        from_slot = position % source.block_size * slot_bytes
        to_slot = position % target.block_size * slot_bytes
        for layer in range(part.first_layer, part.last_layer):
            for side in (0, 1):
                for head in range(part.first_head, part.last_head):
                    yield (
                        from_block + _offset(source, layer, side, head) + from_slot,
                        to_block + _offset(target, layer, side, head) + to_slot,
                        num_slots * slot_bytes,
                    )
        position += num_slots


def _offset(layout: KVLayout, layer: int, side: int, head: int) -> int:
    """Offset in a block of slot 0 of keys (side 0) or values (side 1); layer and head are counted over the whole model."""
    row = ((layer - layout.first_layer) * 2 + side) * layout.num_kv_heads + head - layout.first_head
    return row * layout.block_size * layout.head_dim * layout.item_bytes


def _merged(runs: Iterator[Run]) -> Iterator[Run]:
    """Join runs that follow each other at both ends."""
    joined: Run | None = None
    for run in runs:
        if joined is None:
            joined = run
        elif joined[0] + joined[2] == run[0] and joined[1] + joined[2] == run[1]:
            joined = (joined[0], joined[1], joined[2] + run[2])
        else:
            yield joined
            joined = run
    if joined is not None:
        yield joined
