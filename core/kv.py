"""The KV cache seen from outside the engine: its geometry, its hashes, and who may hold blocks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from .request import WorkerRef

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Geometry of one rank's pool: `kv[block, layer, 2, kv_head, slot, dim]`, contiguous in this order.

    One block is one contiguous run of `block_bytes`. `first_layer` and `first_head` place this
    rank's slice in the model (pipeline and tensor parallel).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    first_layer: int = 0
    first_head: int = 0

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * self.item_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` token slots."""
        return -(-num_tokens // self.block_size)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one rank's pool can be reached.

    address     host:port of the worker's peer server (side channel and byte streams)
    host        name of the machine (boot id): shared memory works only between equal ones
    shm_path    path that a process of this host may open to map the pool; empty when there is none
    handle      what a process of this host may open the pool by when it is on a device; empty when it cannot
    num_blocks  size of the pool
    """

    worker: WorkerRef
    address: str
    host: str
    shm_path: str
    num_blocks: int
    layout: KVLayout
    handle: bytes = b""


class BlockAllocator(Protocol):
    """What a handoff needs from a block pool. Every method is synchronous and pure state."""

    @property
    def num_free(self) -> int: ...

    def lookup(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Leading full blocks of `tokens` that are cached, each with one reference taken for the caller."""
        ...

    def allocate(self, num_blocks: int) -> tuple[int, ...] | None:
        """`num_blocks` fresh blocks with one reference each, or None (and nothing taken) when short."""
        ...

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block."""
        ...

    def quarantine(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block, but keep it from reuse: somebody may still write to it."""
        ...

    def end_quarantine(self, blocks: Sequence[int]) -> None:
        """The writer is gone: quarantined blocks become free."""
        ...


def block_hashes(tokens: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Chained hashes of the full blocks of `tokens`: equal hash means equal tokens from the start on.

    Only blocks that leave at least one token to compute are useful for a prefix hit; callers trim.
    """
    hashes = []
    parent = b""
    for end in range(block_size, len(tokens) + 1, block_size):
        digest = blake2b(parent, digest_size=16)
        digest.update(b"".join(t.to_bytes(4, "little") for t in tokens[end - block_size : end]))
        parent = digest.digest()
        hashes.append(parent)
    return tuple(hashes)
