"""Bytes through the gRPC side channel itself: for where nothing but gRPC passes.

Each chunk carries its place and its checksum; the receiver copies it straight from the message into its pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .cuts import cut, header_of, only_endpoint, runs_of
from .frames import CHUNK_BYTES, Kind, checksum_of
from .link import Connection, PeerLinks
from .pool import KvMemory
from .ticket import Ticket
from .transport import Copy, Header, Note, TransferStats

SEGMENT_BYTES = 8 << 20  # brought to the host at a time, by pools that are elsewhere

Tamper = Callable[[Header, memoryview], None]


class GrpcTransport:
    """Pushes from `memory` to any worker whose address can be dialled.

    tamper  for tests: called with the bytes of each chunk after its checksum was taken
    """

    name = "grpc"

    def __init__(self, memory: KvMemory, links: PeerLinks, checksum: bool = True, tamper: Tamper | None = None) -> None:
        self._memory = memory
        self._links = links
        self._checksum = checksum
        self._tamper = tamper

    def reaches(self, endpoint: Endpoint) -> bool:
        """Any worker that announces an address."""
        return bool(endpoint.address)

    async def push(self, copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        """See `Transport.push`."""
        endpoint = only_endpoint(ticket, copies)
        if not self.reaches(endpoint):
            raise TransferRefused(f"{endpoint.worker} announces no address")
        header, num_bytes, started = header_of(ticket, note), sum(copy.num_bytes for copy in copies), time.perf_counter()
        link = self._links.to(endpoint)
        async with link.budget.take(num_bytes), link.connected() as connection:
            copying = time.perf_counter()
            await self._send(connection, copies, header)
        finished = time.perf_counter()
        return TransferStats(num_bytes, finished - started, finished - copying if copies else 0.0, self.name)

    async def stop(self, ticket_source: WorkerRef, attempt: Attempt, to: Endpoint) -> None:
        """See `Transport.stop`."""
        await self._links.to(to).stop(Header(attempt, ticket_source, to.worker, 0, Note(0, 0)))

    async def close(self) -> None:
        """See `Transport.close`."""
        await self._links.close()

    async def _send(self, connection: Connection, copies: Sequence[Copy], header: Header) -> None:
        async with connection.conversation() as talk:
            async for segment, buffer in self._memory.staged(copies, SEGMENT_BYTES):
                for pieces in cut(segment, CHUNK_BYTES):
                    payload = tuple(buffer[p.source_offset : p.source_offset + p.num_bytes] for p in pieces)
                    checksum = checksum_of(payload) if self._checksum else None
                    await talk.send(Kind.CHUNK, header, runs_of(pieces), checksum, self._tampered(header, payload))
            await talk.send(Kind.PLACED, header)
            await talk.reply()

    def _tampered(self, header: Header, payload: tuple[memoryview, ...]) -> tuple[memoryview, ...]:
        if self._tamper is None:
            return payload
        copy = memoryview(bytearray(b"".join(payload)))
        self._tamper(header, copy)
        return (copy,)
