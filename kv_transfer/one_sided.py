"""What transports share that write into the target's memory themselves, so that no byte passes a socket.

Frames on the side channel say which bytes are there and carry their checksums. A one-sided write cannot be refused, so the
source asks the receiver whether a ticket lives before its first write under it, once per ticket and connection.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from ..core.errors import TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .cuts import header_of, only_endpoint, runs_of
from .frames import Kind
from .link import Connection, PeerLinks, to_the_end
from .ticket import Ticket
from .transport import Copy, Header, Note, TransferStats


class Mapped(Protocol):
    """A peer's memory, opened here."""

    def close(self) -> None: ...


M = TypeVar("M", bound=Mapped)


@dataclass(slots=True)
class _Peer(Generic[M]):
    """What is known of a peer while a connection to it lasts."""

    memory: M
    asked: set[tuple[Attempt, int]] = field(default_factory=set)  # tickets (by generation) that the receiver said live


class OneSidedTransport(ABC, Generic[M]):
    """See `transport.Transport`; what is left is to open a peer's memory and to write to it."""

    name: str

    def __init__(self, host: str, links: PeerLinks) -> None:
        self._host = host
        self._links = links
        self._peers: dict[Connection, _Peer[M]] = {}
        self._mapping = asyncio.Lock()

    @abstractmethod
    def reaches(self, endpoint: Endpoint) -> bool: ...

    @abstractmethod
    def _open(self, endpoint: Endpoint) -> M:
        """Open the pool of `endpoint`, on a thread of its own. Raises TransferRefused."""

    @abstractmethod
    def _write(self, copies: Sequence[Copy], memory: M, header: Header) -> AsyncIterator[tuple[Sequence[Copy], int | None]]:
        """Write segment by segment; yields each one with its checksum (None without) once its bytes are there."""

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

    async def _peer(self, connection: Connection, endpoint: Endpoint) -> _Peer[M]:
        """The peer's pool, mapped once per connection."""
        async with self._mapping:
            peer = self._peers.get(connection)
            if peer is None:
                opening = asyncio.create_task(asyncio.to_thread(self._open, endpoint))
                peer = self._peers[connection] = _Peer(await to_the_end(opening))
                connection.when_closed(lambda: self._unmap(connection))
            return peer

    def _unmap(self, connection: Connection) -> None:
        peer = self._peers.pop(connection, None)
        if peer is not None:
            peer.memory.close()

    async def _ask(self, connection: Connection, peer: _Peer[M], header: Header) -> None:
        """Make sure that the receiver knows this ticket before anything is written under it."""
        if (header.attempt, header.generation) not in peer.asked:
            note = replace(header.note, num_blocks=0, last=False, first_token=-1)
            await self._send(connection, peer, (), replace(header, note=note))
            peer.asked.add((header.attempt, header.generation))

    async def _send(self, connection: Connection, peer: _Peer[M], copies: Sequence[Copy], header: Header) -> float:
        """Write segment by segment and wait for the acknowledgement; return the seconds spent writing."""
        seconds, left = 0.0, sum(copy.num_bytes for copy in copies)
        async with connection.conversation() as talk:
            segments = self._write(copies, peer.memory, header)
            while left:
                connection.check_alive()  # else the pool is not mapped any more
                started = time.perf_counter()
                segment, checksum = await anext(segments)
                seconds += time.perf_counter() - started
                left -= sum(copy.num_bytes for copy in segment)
                await talk.send(Kind.WRITTEN if left else Kind.PLACED, header, runs_of(segment), checksum)
            if not copies:
                await talk.send(Kind.PLACED, header)
            await talk.reply()
        return seconds
