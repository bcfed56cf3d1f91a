"""Who holds which block of the KV pool: references, prefix cache, quarantine, generations.

Every block is in exactly one state::

    free         no reference, nothing of use in it
    cached       no reference, holds the KV of a known prefix; evicted, least recently used first, when free blocks run out
    used         one or more references (sequences, tickets, running pushes: a pin is a reference)
    quarantined  somebody who cannot be stopped may still write to it; never reused before `end_quarantine`

Pure bookkeeping: it never touches KV memory, and it never guesses. What breaks a rule raises InternalError.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from ..core.errors import InternalError


class HashChain:
    """The chained hashes of one growing token list (`core.kv.block_hashes`), each computed once."""

    __slots__ = ("_block_size", "_hashes", "_pack")

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._hashes: list[bytes] = []
        self._pack = struct.Struct(f"<{block_size}I").pack

    def first(self, num_blocks: int, tokens: Sequence[int]) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks of `tokens`, which may only have grown since the last call."""
        hashes = self._hashes
        parent = hashes[-1] if hashes else b""
        for start in range(len(hashes) * self._block_size, num_blocks * self._block_size, self._block_size):
            digest = blake2b(parent, digest_size=16)
            digest.update(self._pack(*tokens[start : start + self._block_size]))
            parent = digest.digest()
            hashes.append(parent)
        return hashes[:num_blocks]


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The state of every block, for tests and reports. `cached` is in order of eviction."""

    references: tuple[int, ...]
    free: frozenset[int]
    cached: tuple[int, ...]
    quarantined: frozenset[int]
    hashed: frozenset[int]


class BlockPool:
    """`core.kv.BlockAllocator` over blocks 0 .. num_blocks - 1 of `block_size` token slots each."""

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise InternalError(f"a pool of {num_blocks} blocks of {block_size} tokens: both must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._references = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: recently used memory is warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # a plain dict scans its holes to find the oldest key
        self._quarantined: Counter[int] = Counter()

    # ---- counts --------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones that it may evict."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without a reference that are kept for prefix hits."""
        return len(self._cached)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def generation(self, block: int) -> int:
        """How often `block` has been allocated."""
        self._require_exists(block)
        return self._generations[block]

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` token slots."""
        return -(-num_tokens // self.block_size)

    # ---- references ----------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> tuple[int, ...] | None:
        """`num_blocks` fresh blocks with one reference each, or None (and nothing taken or evicted) when short."""
        if num_blocks > self.num_free:
            return None
        blocks = tuple(self._free.pop() if self._free else self._evict() for _ in range(num_blocks))
        for block in blocks:
            self._references[block] = 1
            self._generations[block] += 1
        return blocks

    def retain(self, blocks: Sequence[int]) -> None:
        """Take one more reference of each block; every one must be referenced already."""
        self._require_references(set(blocks), "retained")
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block. At zero, a block with a known prefix stays cached, any other is free."""
        self._require_references(blocks, "released")
        references = self._references
        for block in reversed(blocks):  # the tail of a prefix ends up older than its head, and is evicted first
            references[block] -= 1
            if references[block] == 0:
                self._settle(block)

    # ---- prefix cache --------------------------------------------------------------------------

    def lookup(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Leading full blocks of `tokens` whose KV is here, with one reference each taken for the caller."""
        if not self.prefix_cache:
            return ()
        return self.lookup_hashes(HashChain(self.block_size).first(len(tokens) // self.block_size, tokens))

    def lookup_hashes(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """`lookup` for a caller that keeps a HashChain."""
        hits = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            hits.append(block)
        return tuple(hits)

    def publish(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """The KV of the full blocks of `tokens` is computed and lies in `blocks`: later lookups may find it."""
        if self.prefix_cache:
            num_blocks = min(len(tokens) // self.block_size, len(blocks))
            self.publish_hashes(HashChain(self.block_size).first(num_blocks, tokens), blocks[:num_blocks])

    def publish_hashes(self, hashes: Sequence[bytes], blocks: Sequence[int]) -> None:
        """`publish` for a caller that keeps a HashChain. When two blocks hold the same prefix, the first one stays known."""
        if not self.prefix_cache:
            return
        self._require_references(blocks, "published")
        for key, block in zip(hashes, blocks, strict=True):
            known = self._hash_of[block]
            if known is not None and known != key:
                raise InternalError(f"block {block} was published with one prefix and now with another: its KV was overwritten")
            if key not in self._block_of and block not in self._quarantined:
                self._block_of[key] = block
                self._hash_of[block] = key

    # ---- quarantine ----------------------------------------------------------------------------

    def quarantine(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block, but keep it from reuse: somebody may still write to it."""
        self._require_references(blocks, "quarantined")
        for block in blocks:
            self._forget_hash(block)  # whatever it holds can change at any time
            self._quarantined[block] += 1
            self._references[block] -= 1

    def end_quarantine(self, blocks: Sequence[int]) -> None:
        """The writer is gone: blocks that nobody else quarantined or references become free."""
        for block in blocks:
            if block not in self._quarantined:
                raise InternalError(f"block {block} is not in quarantine: it cannot leave it")
            self._quarantined[block] -= 1
            if self._quarantined[block] == 0:
                del self._quarantined[block]
                self._settle(block)

    # ---- integrity -----------------------------------------------------------------------------

    def references(self, block: int) -> int:
        """Number of references of `block`."""
        self._require_exists(block)
        return self._references[block]

    def snapshot(self) -> PoolSnapshot:
        """The state of every block."""
        return PoolSnapshot(
            references=tuple(self._references),
            free=frozenset(self._free),
            cached=tuple(self._cached),
            quarantined=frozenset(self._quarantined),
            hashed=frozenset(self._block_of.values()),
        )

    def check(self) -> None:
        """Raise InternalError unless every block is in exactly one state and the prefix index agrees with it."""
        free = Counter(self._free)
        for block in range(self.num_blocks):
            places = {
                "free": free[block],
                "cached": int(block in self._cached),
                "used or quarantined": int(self._references[block] > 0 or block in self._quarantined),
            }
            if self._references[block] < 0 or sum(places.values()) != 1:
                raise InternalError(f"block {block} must be in one state: {places}, {self._references[block]} references")
            key = self._hash_of[block]
            if key is not None and self._block_of.get(key) != block:
                raise InternalError(f"block {block} believes it is known by a prefix that leads to {self._block_of.get(key)}")
            if key is not None and (free[block] or block in self._quarantined):
                raise InternalError(f"block {block} is free or in quarantine and can still be found by its prefix")
            if key is None and block in self._cached:
                raise InternalError(f"block {block} is cached without a prefix")
        num_hashed = sum(key is not None for key in self._hash_of)
        if num_hashed != len(self._block_of):
            raise InternalError(f"{len(self._block_of)} prefixes are known, but {num_hashed} blocks hold one")

    # ---- inside --------------------------------------------------------------------------------

    def _settle(self, block: int) -> None:
        """Put a block where it belongs if neither a reference nor quarantine keeps it any more."""
        if self._references[block] > 0 or block in self._quarantined:
            return
        if self._hash_of[block] is not None:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget_hash(block)
        return block

    def _forget_hash(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None

    def _require_exists(self, block: int) -> None:
        if not 0 <= block < self.num_blocks:
            raise InternalError(f"block {block} does not exist: the pool has blocks 0 to {self.num_blocks - 1}")

    def _require_references(self, blocks: Collection[int], done: str) -> None:
        """Raise before anything is changed unless each block has as many references as it occurs in `blocks`."""
        references, num_blocks = self._references, self.num_blocks
        for block in blocks:
            if not (0 <= block < num_blocks and references[block] >= 1):
                self._require_exists(block)
                raise InternalError(f"block {block} cannot be {done}: nobody holds a reference of it")
        if len(set(blocks)) != len(blocks):
            for block, times in Counter(blocks).items():
                if self._references[block] < times:
                    held = self._references[block]
                    raise InternalError(f"block {block} cannot be {done} {times} times: it has {held} references")
