"""torch.distributed: the source sends, the target receives. NCCL between GPUs, gloo between pools on hosts.

Two-sided, so the target is told first: a JOIN frame makes a group for the connection, a COMING frame announces each segment
before it is sent. The target receives every announced segment, in order, into memory that is no pool's, and decides afterwards
whether it may be written: a refused push costs its bytes, and never leaves the ends disagreeing about what comes next.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.errors import PeerLost, TransferRefused
from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .cuda_ipc import gpu_of
from .cuts import cut, header_of, only_endpoint, runs_of
from .device_pool import DevicePool
from .frames import Kind, Request, Runs, checksum_of
from .link import Connection, Conversation, PeerLinks, to_the_end
from .pool import KvMemory, PoolMemory
from .process_group import RECEIVER, SENDER, Invitation, Lane, open_store
from .tensor_bytes import as_checksum, check_words, digest_of
from .ticket import Ticket
from .transport import Copy, Header, Note, TransferStats

SEGMENT_BYTES = 32 << 20  # announced and sent at a time

Tamper = Callable[[Header, Tensor], None]


class End(ABC):
    """One worker's pool, as segments go out of it and come into it. Its methods run on a lane's thread, but for `take`."""

    backend: str

    @abstractmethod
    def pack(self, runs: Runs) -> Tensor:
        """The bytes of the runs, in order, as a copy that is complete."""

    @abstractmethod
    def room(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] to receive into."""

    @abstractmethod
    def checksum(self, packed: Tensor) -> int: ...

    @abstractmethod
    def take(self, runs: Runs, packed: Tensor) -> None:
        """Write what came to the runs."""


class HostEnd(End):
    """A pool in the host's memory, private or shared."""

    backend = "gloo"

    def __init__(self, memory: PoolMemory) -> None:
        self._memory = memory

    def pack(self, runs: Runs) -> Tensor:
        buffer = self._memory.buffer
        return torch.frombuffer(bytearray(b"".join(buffer[at : at + length] for at, length in runs)), dtype=torch.uint8)

    def room(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def checksum(self, packed: Tensor) -> int:
        return checksum_of([packed.numpy().data])

    def take(self, runs: Runs, packed: Tensor) -> None:
        self._memory.write(runs, packed.numpy().data)


class DeviceEnd(End):
    """A pool on a device. Segments stay there from end to end."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self.backend = "nccl" if pool.device.torch_device.type == "cuda" else "gloo"

    def pack(self, runs: Runs) -> Tensor:
        check_words(runs)
        return self._done(lambda: self._pool.bytes.pack(runs))

    def room(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._pool.device.torch_device)

    def checksum(self, packed: Tensor) -> int:
        return as_checksum(self._done(lambda: digest_of(packed)))

    def take(self, runs: Runs, packed: Tensor) -> None:
        check_words(runs)
        self._pool.launch_in(lambda: self._pool.bytes.unpack(runs, packed))

    def _done(self, work: Callable[[], Tensor]) -> Tensor:
        """Run `work` beside the engine's steps, and wait for it."""
        made: list[Tensor] = []
        done = self._pool.outgoing.event()
        self._pool.outgoing.launch(lambda: made.append(work()))
        done.record()
        done.wait()
        return made[0]


def end_of(memory: KvMemory) -> End:
    """The end for a worker's pool."""
    if isinstance(memory, DevicePool):
        return DeviceEnd(memory)
    assert isinstance(memory, PoolMemory)
    return HostEnd(memory)


class TorchDistTransport:
    """Pushes from a pool to workers whose pool is of the same kind.

    own     this worker: where its stores listen, and on which GPU its pool is
    tamper  for tests: called with a segment after its checksum was taken
    """

    name = "torch_dist"

    def __init__(
        self, end: End, own: Endpoint, links: PeerLinks, patience: float, checksum: bool = True, tamper: Tamper | None = None
    ) -> None:
        self._end = end
        self._own = own
        self._host = own.address.rpartition(":")[0].strip("[]")
        self._links = links
        self._patience = patience
        self._checksum = checksum
        self._tamper = tamper
        self._lanes: dict[Connection, asyncio.Task[Lane]] = {}

    def reaches(self, endpoint: Endpoint) -> bool:
        """Pools on hosts from hosts; pools on GPUs from other GPUs: NCCL refuses two ends on one."""
        if not endpoint.address or bool(endpoint.handle) != bool(self._own.handle):
            return False
        return not endpoint.handle or gpu_of(endpoint.handle) != gpu_of(self._own.handle)

    async def push(self, copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        """See `Transport.push`."""
        endpoint = only_endpoint(ticket, copies)
        if not self.reaches(endpoint):
            raise TransferRefused(f"torch_dist does not reach the pool of {endpoint.worker} from that of {self._own.worker}")
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
            if copies:
                lane = await self._lane(connection, header)
                for segment in cut(copies, SEGMENT_BYTES):
                    connection.check_alive()
                    await to_the_end(asyncio.ensure_future(self._segment(connection, lane, talk, header, segment)))
            await talk.send(Kind.PLACED, header)
            await talk.reply()

    async def _segment(
        self, connection: Connection, lane: Lane, talk: Conversation, header: Header, segment: Sequence[Copy]
    ) -> None:
        """Announce a segment and send it: never the one without the other, or the ends would disagree about what comes next."""
        packed, checksum = await lane.do(lambda: self._packed(header, segment))
        async with lane.order:
            await talk.send(Kind.COMING, header, runs_of(segment), checksum)
            sending = lane.send(packed)
        try:
            await sending
        except PeerLost as error:
            await connection.close(str(error))
            raise

    def _packed(self, header: Header, segment: Sequence[Copy]) -> tuple[Tensor, int | None]:
        packed = self._end.pack(tuple((copy.source_offset, copy.num_bytes) for copy in segment))
        checksum = self._end.checksum(packed) if self._checksum else None
        if self._tamper is not None:
            self._tamper(header, packed)
        return packed, checksum

    async def _lane(self, connection: Connection, header: Header) -> Lane:
        """The lane of a connection, made when it is first needed."""
        joining = self._lanes.get(connection)
        if joining is None:
            joining = self._lanes[connection] = asyncio.create_task(self._join(connection, header))
            connection.when_closed(lambda: self._leave(connection))
        try:
            return await asyncio.shield(joining)
        except asyncio.CancelledError:
            if joining.cancelled():
                connection.check_alive()  # says why
            raise

    async def _join(self, connection: Connection, header: Header) -> Lane:
        lane = Lane(self._patience)
        try:
            store = await lane.do(lambda: open_store(self._host, self._patience))
            invitation = Invitation(self._host, store.port, self._end.backend)
            meeting = lane.open(invitation, SENDER, store)
            async with connection.conversation() as talk:
                await talk.send(Kind.JOIN, header, payload=(memoryview(invitation.pack()),))
                await talk.reply()
            await meeting
        except BaseException:
            self._lanes.pop(connection, None)
            lane.close()
            raise
        return lane

    def _leave(self, connection: Connection) -> None:
        joining = self._lanes.pop(connection, None)
        if joining is None:
            return
        if joining.done() and not joining.cancelled() and joining.exception() is None:
            joining.result().close()
        joining.cancel()


class Inbox:
    """The receiving end of one source's lane, for the peer server."""

    def __init__(self, end: End, patience: float) -> None:
        self._end = end
        self._patience = patience
        self._lane: Lane | None = None

    async def join(self, payload: memoryview) -> None:
        """Accept an invitation. Raises TransferRefused for another backend than this pool's, PeerLost when nobody is there."""
        invitation = Invitation.unpack(payload)
        if invitation.backend != self._end.backend:
            raise TransferRefused(f"this worker receives over {self._end.backend}, not over {invitation.backend}")
        self.close()
        self._lane = Lane(self._patience)
        await self._lane.open(invitation, RECEIVER)

    async def receive(self, request: Request) -> tuple[Tensor, int]:
        """The bytes that a COMING frame announces, and their checksum."""
        num_bytes = sum(length for _, length in request.runs)
        if self._lane is None or not 0 < num_bytes <= SEGMENT_BYTES:
            raise PeerLost(f"a segment of {num_bytes} bytes was announced that cannot be received here")
        packed = await self._lane.receive(lambda: self._end.room(num_bytes))
        return packed, await self._lane.do(lambda: self._end.checksum(packed))

    def take(self, runs: Runs, packed: Tensor) -> None:
        """Write what came to the pool."""
        self._end.take(runs, packed)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()
