"""Shared memory: the source maps the target's pool and copies straight into it.

The bytes never pass a socket; a frame on the side channel says that they are there and carries their checksum.
A one-sided write cannot be refused, so the source asks the receiver whether a ticket lives before its first
write under it, once per ticket and connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .checks import header_of, only_endpoint
from .frames import Kind
from .link import Connection, PeerLinks, to_the_end
from .pool import PoolMemory
from .ticket import Ticket
from .transport import Copy, Header, Note, TransferStats

PIECE_BYTES = 1 << 20  # hashed and copied at a time: still in a cache when it is copied, and few changes of the GIL
INLINE_BYTES = 1 << 20  # copied on the event loop; a thread costs more

Tamper = Callable[[Header, memoryview], None]


@dataclass(slots=True)
class _Peer:
    """What is known of a peer while a connection to it lasts."""

    memory: PoolMemory
    asked: set[tuple[Attempt, int]] = field(default_factory=set)  # tickets (by generation) that the receiver said live


class ShmTransport:
    """Pushes from `memory` into the shared pools of workers on the machine `host`.

    tamper  for tests: called with the bytes in the target pool after the checksum was taken
    """

    name = "shm"

    def __init__(
        self, memory: PoolMemory, host: str, links: PeerLinks, checksum: bool = True, tamper: Tamper | None = None
    ) -> None:
        self._memory = memory
        self._host = host
        self._links = links
        self._checksum = checksum
        self._tamper = tamper
        self._peers: dict[Connection, _Peer] = {}
        self._mapping = asyncio.Lock()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="baton-shm")

    def reaches(self, endpoint: Endpoint) -> bool:
        """Only pools of this machine that have a path."""
        return bool(endpoint.shm_path) and endpoint.host == self._host

    async def push(self, copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        """See `Transport.push`."""
        endpoint = only_endpoint(ticket, copies)
        if not self.reaches(endpoint):
            raise TransferRefused(f"the pool of {endpoint.worker} on {endpoint.host} cannot be mapped on {self._host}")
        header, num_bytes, started = header_of(ticket, note), sum(copy.num_bytes for copy in copies), time.perf_counter()
        link = self._links.to(endpoint)
        async with link.budget.take(num_bytes), link.connected() as connection:
            peer = await self._peer(connection, endpoint)
            if copies:
                await self._ask(connection, peer, header)
            connection.check_alive()  # else the mapping is gone
            copying = time.perf_counter()
            checksum = await self._copy(peer.memory, copies, header)
            copied = time.perf_counter()
            runs = tuple((copy.target_offset, copy.num_bytes) for copy in copies)
            await _placed(connection, header, runs, checksum)
            key = (ticket.attempt, ticket.generation)
            peer.asked.discard(key) if note.last else peer.asked.add(key)
        return TransferStats(num_bytes, time.perf_counter() - started, copied - copying, self.name)

    async def stop(self, ticket_source: WorkerRef, attempt: Attempt, to: Endpoint) -> None:
        """See `Transport.stop`."""
        for peer in self._peers.values():
            peer.asked = {key for key in peer.asked if key[0] != attempt}
        await self._links.to(to).stop(Header(attempt, ticket_source, to.worker, 0, Note(0, 0)))

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._links.close()
        self._threads.shutdown(wait=True)

    async def _peer(self, connection: Connection, endpoint: Endpoint) -> _Peer:
        """The peer's pool, mapped once per connection (it takes about 0.2 ms per MiB)."""
        async with self._mapping:
            peer = self._peers.get(connection)
            if peer is None:
                num_bytes = endpoint.num_blocks * endpoint.layout.block_bytes
                opening = asyncio.get_running_loop().run_in_executor(self._threads, PoolMemory.open, endpoint.shm_path, num_bytes)
                peer = self._peers[connection] = _Peer(await to_the_end(opening))
                connection.when_closed(lambda: self._unmap(connection))
            return peer

    def _unmap(self, connection: Connection) -> None:
        peer = self._peers.pop(connection, None)
        if peer is not None:
            peer.memory.close()

    async def _ask(self, connection: Connection, peer: _Peer, header: Header) -> None:
        """Make sure that the receiver knows this ticket before anything is written under it."""
        if (header.attempt, header.generation) not in peer.asked:
            note = replace(header.note, num_blocks=0, last=False, first_token=-1)
            await _placed(connection, replace(header, note=note), (), None)
            peer.asked.add((header.attempt, header.generation))

    async def _copy(self, target: PoolMemory, copies: Sequence[Copy], header: Header) -> int | None:
        """Copy every run; return the checksum of the source's bytes. Has ended when it returns or raises."""
        if not copies:
            return None
        job = _CopyJob(self._memory, target, copies, self._checksum)
        if sum(copy.num_bytes for copy in copies) <= INLINE_BYTES:
            checksum = job.run()
        else:
            checksum = await to_the_end(asyncio.get_running_loop().run_in_executor(self._threads, job.run))
        if self._tamper is not None:
            for copy in copies:
                self._tamper(header, job.target_bytes(copy))
        return checksum


class _CopyJob:
    """Runs of one push, copied and hashed in one pass. The views taken here keep the target mapped until it ends."""

    def __init__(self, source: PoolMemory, target: PoolMemory, copies: Sequence[Copy], checksum: bool) -> None:
        self._source: NDArray[np.uint8] = np.frombuffer(source.buffer, dtype=np.uint8)
        self._target: NDArray[np.uint8] = np.frombuffer(target.buffer, dtype=np.uint8)
        self._copies = copies
        self._digest = xxhash.xxh3_64() if checksum else None

    def run(self) -> int | None:
        for copy in self._copies:
            for start in range(0, copy.num_bytes, PIECE_BYTES):
                length = min(PIECE_BYTES, copy.num_bytes - start)
                from_byte, to_byte = copy.source_offset + start, copy.target_offset + start
                piece = self._source[from_byte : from_byte + length]
                if self._digest is not None:
                    self._digest.update(piece.data)
                self._target[to_byte : to_byte + length] = piece
        return None if self._digest is None else self._digest.intdigest()

    def target_bytes(self, copy: Copy) -> memoryview:
        return self._target[copy.target_offset : copy.target_offset + copy.num_bytes].data


async def _placed(connection: Connection, header: Header, runs: tuple[tuple[int, int], ...], checksum: int | None) -> None:
    async with connection.conversation() as talk:
        await talk.send(Kind.PLACED, header, runs, checksum)
        await talk.reply()
