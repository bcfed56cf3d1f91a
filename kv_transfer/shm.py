"""Shared memory: the source maps the target's pool and copies straight into it.

The bytes never pass a socket; frames on the side channel say that they are there and carry their checksums.
A one-sided write cannot be refused, so the source asks the receiver whether a ticket lives before its first
write under it, once per ticket and connection.

Copies run on the event loop, SEGMENT_BYTES (0.6 ms) at a time: with the GIL contended by an executor's thread,
handing a copy to a thread of its own was measured to take ten times as long as the copy. The receiver verifies
one segment while the next is being copied.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .cuts import cut, cut_runs, header_of, only_endpoint, runs_of
from .frames import Kind
from .link import Connection, PeerLinks, to_the_end
from .pool import PoolMemory
from .ticket import Ticket
from .transport import Copy, Header, Note, TransferStats

SEGMENT_BYTES = 8 << 20  # copied without giving up the event loop
PIECE_BYTES = 512 << 10  # hashed and copied at a time: still in a cache when it is copied

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
            copy_seconds = await self._send(connection, peer, copies, header)
            key = (ticket.attempt, ticket.generation)
            peer.asked.discard(key) if note.last else peer.asked.add(key)
        return TransferStats(num_bytes, time.perf_counter() - started, copy_seconds, self.name)

    async def stop(self, ticket_source: WorkerRef, attempt: Attempt, to: Endpoint) -> None:
        """See `Transport.stop`."""
        for peer in self._peers.values():
            peer.asked = {key for key in peer.asked if key[0] != attempt}
        await self._links.to(to).stop(Header(attempt, ticket_source, to.worker, 0, Note(0, 0)))

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._links.close()

    async def _peer(self, connection: Connection, endpoint: Endpoint) -> _Peer:
        """The peer's pool, mapped once per connection (it takes about 0.2 ms per MiB)."""
        async with self._mapping:
            peer = self._peers.get(connection)
            if peer is None:
                num_bytes = endpoint.num_blocks * endpoint.layout.block_bytes
                opening = asyncio.create_task(asyncio.to_thread(PoolMemory.open, endpoint.shm_path, num_bytes))
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
            await self._send(connection, peer, (), replace(header, note=note))
            peer.asked.add((header.attempt, header.generation))

    async def _send(self, connection: Connection, peer: _Peer, copies: Sequence[Copy], header: Header) -> float:
        """Copy segment by segment and wait for the acknowledgement; return the seconds spent copying."""
        seconds = 0.0
        segments = list(cut(copies, SEGMENT_BYTES))
        async with connection.conversation() as talk:
            for number, segment in enumerate(segments, start=1):
                connection.check_alive()  # else the pool is not mapped any more
                started = time.perf_counter()
                checksum = self._copy(peer.memory, segment)
                seconds += time.perf_counter() - started
                self._tampered(peer.memory, segment, header)
                kind = Kind.PLACED if number == len(segments) else Kind.WRITTEN
                await talk.send(kind, header, runs_of(segment), checksum)
            if not segments:
                await talk.send(Kind.PLACED, header)
            await talk.reply()
        return seconds

    def _copy(self, memory: PoolMemory, segment: Sequence[Copy]) -> int | None:
        """Copy a segment and return the checksum of its source bytes, in one pass over them."""
        source: NDArray[np.uint8] = np.frombuffer(self._memory.buffer, dtype=np.uint8)
        target: NDArray[np.uint8] = np.frombuffer(memory.buffer, dtype=np.uint8)
        digest = xxhash.xxh3_64() if self._checksum else None
        for copy in cut_runs(segment, PIECE_BYTES):
            piece = source[copy.source_offset : copy.source_offset + copy.num_bytes]
            if digest is not None:
                digest.update(piece.data)
            target[copy.target_offset : copy.target_offset + copy.num_bytes] = piece
        return None if digest is None else digest.intdigest()

    def _tampered(self, memory: PoolMemory, segment: Sequence[Copy], header: Header) -> None:
        if self._tamper is not None:
            for copy in segment:
                self._tamper(header, memory.buffer[copy.target_offset : copy.target_offset + copy.num_bytes])
