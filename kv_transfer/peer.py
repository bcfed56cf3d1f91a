"""The receiving side of the side channel: checks every frame with the sink before a byte of it is accepted.

Serves the shm transport (the bytes lie in the pool already and are verified in place) and the grpc transport
(the bytes come along). Frames of one source are handled in order, so its STOP comes after all it has sent.
A frame is checked, verified and copied without giving up the event loop in between: no byte is ever written
under a ticket that has died meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import grpc
from torch import Tensor

from ..core.errors import PeerLost, TransferDamaged, TransferError, TransferRefused
from ..core.request import WorkerRef
from .frames import METHOD_NAME, METHOD_SERVICE, Kind, Reply, Request, Status, checksum_of
from .link import PATIENCE
from .pool import KvMemory
from .torch_dist import Inbox, end_of
from .transport import Sink

logger = logging.getLogger("baton.kv_transfer")


def add_peer_service(
    server: grpc.aio.Server, memory: KvMemory, worker: WorkerRef, sink: Sink, checksum: bool = True
) -> PeerServer:
    """Let `worker` receive KV into `memory` over `server`. With `checksum` bytes that come without one are refused."""
    peer = PeerServer(memory, worker, sink, checksum)
    handler = grpc.stream_stream_rpc_method_handler(peer.transfer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(METHOD_SERVICE, {METHOD_NAME: handler}),))
    return peer


class PeerServer:
    """One worker's receiving end, for all its sources."""

    def __init__(self, memory: KvMemory, worker: WorkerRef, sink: Sink, checksum: bool) -> None:
        self._memory = memory
        self._worker = worker
        self._sink = sink
        self._checksum = checksum
        self._end = end_of(memory)

    async def transfer(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """The stream of one source, until it ends."""
        inbox = Inbox(self._end, PATIENCE)
        try:
            while isinstance(frame := await context.read(), bytes):  # else the end of the stream
                try:
                    request, payload = Request.unpack(frame)
                except TransferDamaged as error:
                    # Nobody can say whose frame it was: everything under way on this stream is in doubt.
                    await context.abort(grpc.StatusCode.DATA_LOSS, str(error))
                try:
                    reply = await self._answer(request, payload, inbox)
                except PeerLost as error:
                    # Nobody can say what comes next in the process group: the source makes another one on a new stream.
                    await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
                if reply is not None:
                    await context.write(reply.pack())
        finally:
            inbox.close()

    async def _answer(self, request: Request, payload: memoryview, inbox: Inbox) -> Reply | None:
        """As `answer`, for the frames of a process group too. Raises PeerLost when that is not to be used any more."""
        if request.kind is Kind.JOIN:
            try:
                await inbox.join(payload)
            except (TransferRefused, TransferDamaged) as error:
                return Reply.to_error(request.number, error)
            return Reply(request.number, Status.OK)
        if request.kind is not Kind.COMING:
            return self.answer(request, payload)
        refused = self._refusal(request)
        packed, checksum = await inbox.receive(request)  # whatever is to be said of it: it is on its way
        refused = refused or self._refusal(request)
        return refused or self._guarded(request, lambda: self._take_segment(request, packed, checksum, inbox))

    def answer(self, request: Request, payload: memoryview) -> Reply | None:
        """Handle one frame; None when it needs no answer."""
        return self._guarded(request, lambda: self._handle(request, payload))

    def _refusal(self, request: Request) -> Reply | None:
        """The answer to a frame whose bytes must not be written; None when they may."""

        def check() -> Reply | None:
            self._sink.check(request.header)
            self._check_runs(request)
            return None

        return self._guarded(request, check)

    def _take_segment(self, request: Request, packed: Tensor, checksum: int, inbox: Inbox) -> Reply | None:
        if self._checksum:
            _compare(request, checksum)
        inbox.take(request.runs, packed)
        return None

    def _guarded(self, request: Request, work: Callable[[], Reply | None]) -> Reply | None:
        """Do `work` for a frame that is meant for this worker; what goes wrong becomes the answer."""
        try:
            if request.header.target != self._worker:
                raise TransferRefused(f"the frame is for {request.header.target}, this is {self._worker}")
            return work()
        except TransferDamaged as error:
            logger.warning("%s from %s: %s", request.header.attempt, request.header.source, error)
            self._sink.damaged(request.header, str(error))
            return Reply.to_error(request.number, error)
        except TransferError as error:
            return Reply.to_error(request.number, error)

    def _handle(self, request: Request, payload: memoryview) -> Reply | None:
        match request.kind:
            case Kind.CHUNK:
                self._take_chunk(request, payload)
                return None
            case Kind.WRITTEN:
                self._verify(request)
                return None
            case Kind.PLACED:
                self._verify(request)
                self._sink.landed(request.header)
            case Kind.STOP:
                self._sink.stopped(request.header.source, request.header.attempt)
        return Reply(request.number, Status.OK)

    def _take_chunk(self, request: Request, payload: memoryview) -> None:
        """Copy the bytes of one chunk (at most CHUNK_BYTES, 0.1 ms) into the pool."""
        self._sink.check(request.header)
        self._check_runs(request)
        num_bytes = sum(length for _, length in request.runs)
        if len(payload) != num_bytes:
            raise TransferDamaged(f"a chunk of {len(payload)} bytes came where {num_bytes} were announced")
        if self._checksum:
            _compare(request, checksum_of([payload]))
        self._memory.write(request.runs, payload)

    def _verify(self, request: Request) -> None:
        """Compare bytes that lie in the pool with their checksum (a segment of `shm`: 0.3 ms)."""
        if not request.runs:
            return
        self._sink.check(request.header)
        self._check_runs(request)
        if self._checksum:
            _compare(request, self._memory.digest(request.runs))

    def _check_runs(self, request: Request) -> None:
        size = self._memory.num_bytes
        for offset, length in request.runs:
            if not 0 <= offset <= offset + length <= size:
                raise TransferDamaged(f"bytes [{offset}, {offset + length}) are outside of a pool of {size} bytes")
        if self._checksum and request.checksum is None:
            raise TransferDamaged("the bytes came without a checksum, which this worker asks for")


def _compare(request: Request, found: int) -> None:
    if found != request.checksum:
        raise TransferDamaged(f"checksum {found:016x} instead of {request.checksum or 0:016x}")
