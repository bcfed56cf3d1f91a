"""Shared memory: the source maps the target's pool and copies straight into it.

Copies run on the event loop, SEGMENT_BYTES (0.6 ms) at a time: with the GIL contended by an executor's thread,
handing a copy to a thread of its own was measured to take ten times as long as the copy. The receiver verifies
one segment while the next is being copied.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..core.kv import Endpoint
from .cuts import cut_runs
from .link import PeerLinks
from .one_sided import OneSidedTransport
from .pool import KvMemory, PoolMemory
from .transport import Copy, Header

SEGMENT_BYTES = 8 << 20  # copied without giving up the event loop
PIECE_BYTES = 512 << 10  # hashed and copied at a time: still in a cache when it is copied

Tamper = Callable[[Header, memoryview], None]


class ShmTransport(OneSidedTransport[PoolMemory]):
    """Pushes from `memory` into the shared pools of workers on the machine `host`.

    tamper  for tests: called with the bytes in the target pool after the checksum was taken
    """

    name = "shm"

    def __init__(
        self, memory: KvMemory, host: str, links: PeerLinks, checksum: bool = True, tamper: Tamper | None = None
    ) -> None:
        super().__init__(host, links)
        self._memory = memory
        self._checksum = checksum
        self._tamper = tamper

    def reaches(self, endpoint: Endpoint) -> bool:
        """Only pools of this machine that have a path."""
        return bool(endpoint.shm_path) and endpoint.host == self._host

    def _open(self, endpoint: Endpoint) -> PoolMemory:
        """Takes about 0.2 ms per MiB."""
        return PoolMemory.open(endpoint.shm_path, endpoint.num_blocks * endpoint.layout.block_bytes)

    async def _write(
        self, copies: Sequence[Copy], memory: PoolMemory, header: Header
    ) -> AsyncIterator[tuple[Sequence[Copy], int | None]]:
        async for segment, buffer in self._memory.staged(copies, SEGMENT_BYTES):
            checksum = self._copy(buffer, memory, segment)
            if self._tamper is not None:
                for copy in segment:
                    self._tamper(header, memory.buffer[copy.target_offset : copy.target_offset + copy.num_bytes])
            yield segment, checksum

    def _copy(self, buffer: memoryview, memory: PoolMemory, segment: Sequence[Copy]) -> int | None:
        """Copy a segment out of `buffer` and return the checksum of its bytes, in one pass over them."""
        source: NDArray[np.uint8] = np.frombuffer(buffer, dtype=np.uint8)
        target: NDArray[np.uint8] = np.frombuffer(memory.buffer, dtype=np.uint8)
        digest = xxhash.xxh3_64() if self._checksum else None
        for copy in cut_runs(segment, PIECE_BYTES):
            piece = source[copy.source_offset : copy.source_offset + copy.num_bytes]
            if digest is not None:
                digest.update(piece.data)
            target[copy.target_offset : copy.target_offset + copy.num_bytes] = piece
        return None if digest is None else digest.intdigest()
