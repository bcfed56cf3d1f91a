"""Within one process: one pool is copied into another. For tests, and the shape every other transport has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..core.errors import PeerLost, TransferDamaged
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .cuts import header_of, only_endpoint
from .frames import checksum_of
from .pool import PoolMemory
from .ticket import Ticket
from .transport import Copy, Header, Note, Sink, TransferStats

Tamper = Callable[[Header, memoryview], None]


@dataclass(frozen=True, slots=True)
class LocalPeer:
    """A worker of this process that receives."""

    memory: PoolMemory
    sink: Sink


class LocalTransport:
    """Pushes from `memory` into the pools of `peers`; who is not in there (any more) is lost.

    tamper  for tests: called with the bytes in the target pool after the checksum was taken
    """

    name = "local"

    def __init__(
        self,
        memory: PoolMemory,
        peers: Mapping[WorkerRef, LocalPeer],
        checksum: bool = True,
        tamper: Tamper | None = None,
    ) -> None:
        self._memory = memory
        self._peers = peers
        self._checksum = checksum
        self._tamper = tamper

    def reaches(self, endpoint: Endpoint) -> bool:
        """Workers of this process."""
        return endpoint.worker in self._peers

    async def push(self, copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        """See `Transport.push`."""
        peer = self._peers.get(only_endpoint(ticket, copies).worker)
        if peer is None:
            raise PeerLost(f"{ticket.target} is not in this process")
        started = time.perf_counter()
        header = header_of(ticket, note)
        peer.sink.check(header)
        for copy in copies:
            self._copy(copy, peer, header)
        peer.sink.landed(header)
        seconds = time.perf_counter() - started
        return TransferStats(sum(copy.num_bytes for copy in copies), seconds, seconds, self.name)

    async def stop(self, ticket_source: WorkerRef, attempt: Attempt, to: Endpoint) -> None:
        """See `Transport.stop`."""
        peer = self._peers.get(to.worker)
        if peer is not None:
            peer.sink.stopped(ticket_source, attempt)

    async def close(self) -> None:
        """Nothing is held."""

    def _copy(self, copy: Copy, peer: LocalPeer, header: Header) -> None:
        source = self._memory.buffer[copy.source_offset : copy.source_offset + copy.num_bytes]
        target = peer.memory.buffer[copy.target_offset : copy.target_offset + copy.num_bytes]
        target[:] = source
        expected = checksum_of([source]) if self._checksum else None
        if self._tamper is not None:
            self._tamper(header, target)
        if expected is not None and checksum_of([target]) != expected:
            reason = f"the bytes at {copy.target_offset} differ from those sent"
            peer.sink.damaged(header, reason)
            raise TransferDamaged(reason)
