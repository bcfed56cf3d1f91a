"""A controller and workers without a model, for benchmarks of the router: they speak its protocol and compute nothing.

Everything that does not depend on the request is serialised beforehand: a decode step costs them one join of byte
strings per sequence. A prefill worker answers at once; a decode worker makes a step whenever its `Pace` allows one.
`tests/router/fake_cluster.py` has fakes that can fail; these can only be fast.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import grpc
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

BLOCK_SIZE, TOTAL_BLOCKS = 32, 1 << 16
POLL = 0.001  # seconds between looks at the pace; uvloop takes less than a millisecond for none
TICKET = b"t" * 64
EPOCH = 7
MORE = 15  # the field of messages that travel with another one

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"


class Pace(Protocol):
    """Shared by the processes of the benchmark; plain numbers.

    step      seconds from one decode step to the next at least
    window    tokens that may be under way to the clients; no step is made while there are more. 0: no limit
    sent      tokens that the workers have sent; `received` those that clients have got
    """

    step: float
    window: int
    sent: int
    received: int


def token_at(index: int) -> int:
    """The token at output index `index`, of every request."""
    return 300 + index % 512


@dataclass(slots=True, eq=False)
class Row:
    """One sequence at a worker."""

    attempt: bytes  # serialised, as field 1 of what is said of it
    max_tokens: int
    key: bytes
    position: int = 0
    target: str = ""
    granted: bool = False
    prefilled: bool = False
    landed: bool = False


class FakeWorker:
    """A worker of one role. It serves one router at a time."""

    def __init__(self, cluster: FakeCluster, role: Role, worker_id: str) -> None:
        self._cluster = cluster
        self._pace = cluster.pace
        self._role = role
        self.worker_id = worker_id
        self.address = ""
        self._rows: dict[bytes, Row] = {}  # all it knows
        self._running: dict[bytes, Row] = {}  # those that a decode step advances
        self._fresh: list[Row] = []  # to be prefilled
        self._outgoing: asyncio.Queue[bytes] = asyncio.Queue()
        self._work = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._steps: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handlers = {
            "Control": grpc.stream_stream_rpc_method_handler(self._control),
            "Heartbeats": grpc.unary_stream_rpc_method_handler(self._heartbeats),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.v1.Worker", handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        self._steps = asyncio.create_task(self._step_for_ever())

    async def stop(self) -> None:
        if self._server is not None and self._steps is not None:
            self._steps.cancel()
            await self._server.stop(None)

    def registration(self) -> pb.Registration:
        return pb.Registration(worker=self._id(), role=self._role, address=self.address, pid=1, host="benchmark")

    def land(self, row: Row) -> None:
        """The KV of a sequence that was prefilled elsewhere is here."""
        mine = self._rows.get(row.key)
        if mine is not None:
            mine.landed = True
            self._outgoing.put_nowait(_field(4, row.attempt))
            self._running[mine.key] = mine
            self._work.set()

    # ---- service ---------------------------------------------------------------------------------

    async def _control(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        await anext(messages)
        self._rows.clear()
        self._running.clear()
        self._outgoing = asyncio.Queue()
        reader = asyncio.create_task(self._read(messages))
        hello = pb.WorkerHello(worker=self._id(), role=self._role, block_size=BLOCK_SIZE, total_blocks=TOTAL_BLOCKS, pid=1)
        yield pb.WorkerMessage(hello=hello).SerializeToString()
        try:
            while True:
                message = await self._outgoing.get()
                await asyncio.sleep(0)
                more = []
                while not self._outgoing.empty():
                    more.append(_field(MORE, self._outgoing.get_nowait()))
                yield message + b"".join(more)
        finally:
            reader.cancel()

    async def _heartbeats(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        beat = pb.Heartbeat(step=1, prefill_rate=1e6, decode_step=0.001, free_blocks=TOTAL_BLOCKS, total_blocks=TOTAL_BLOCKS)
        while True:
            beat.num_running = len(self._running)
            yield beat.SerializeToString()
            await asyncio.sleep(0.5)

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for data in messages:
            first = pb.RouterMessage.FromString(data)
            for message in (first, *first.more):
                self._handle(message)

    def _handle(self, message: pb.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "submit":
                row = self._row(message.submit.sequence)
                row.target = message.submit.target.worker_id
                if not self._fresh:
                    asyncio.get_running_loop().call_soon(self._prefill, time.monotonic())
                self._fresh.append(row)
            case "reserve":
                row = self._row(message.reserve.sequence)
                row.position = 1
                self._outgoing.put_nowait(_field(3, row.attempt + _field(2, TICKET)))
            case "grant":
                known = self._rows.get(message.grant.attempt.SerializeToString())
                if known is not None:
                    known.granted = True
                    self._hand_over(known)
            case "abort":
                key = message.abort.attempt.SerializeToString()
                self._rows.pop(key, None)
                self._running.pop(key, None)

    def _row(self, spec: pb.SequenceSpec) -> Row:
        key = spec.attempt.SerializeToString()
        row = self._rows[key] = Row(_field(1, key), spec.sampling.max_tokens, key)
        return row

    # ---- steps -----------------------------------------------------------------------------------

    def _prefill(self, began: float) -> None:
        """One step over everything that has come meanwhile."""
        rows, self._fresh = self._fresh, []
        sequences = []
        computing = pb.SequenceTokens(computing=time.monotonic() - began).SerializeToString()
        for row in rows:
            sequences.append(_field(2, row.attempt + self._cluster.tail(0, row.max_tokens) + computing))
            row.position, row.prefilled = 1, True
            self._pace.sent += 1
        self._outgoing.put_nowait(_field(2, b"".join(sequences)))
        for row in rows:
            if row.max_tokens == 1:
                self._rows.pop(row.key, None)
            elif row.target:
                self._hand_over(row)
            else:
                self._running[row.key] = row
                self._work.set()

    def _hand_over(self, row: Row) -> None:
        if row.granted and row.prefilled and self._rows.pop(row.key, None) is not None:
            self._cluster.workers[row.target].land(row)
            self._outgoing.put_nowait(_field(5, row.attempt + self._cluster.handed_over))

    async def _step_for_ever(self) -> None:
        pace = self._pace
        due = 0.0
        while True:
            await self._work.wait()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while self._outgoing.qsize() > 1 or (pace.window and pace.sent - pace.received > pace.window):  # noqa: ASYNC110
                await asyncio.sleep(POLL)
            due = max(due + pace.step, time.monotonic() - pace.step)
            rows = list(self._running.values())
            self._outgoing.put_nowait(_field(2, b"".join(self._advance(rows))))
            pace.sent += len(rows)
            if not self._running:
                self._work.clear()

    def _advance(self, rows: list[Row]) -> Iterator[bytes]:
        tail = self._cluster.tail
        for row in rows:
            yield _field(2, row.attempt + tail(row.position, row.max_tokens))
            row.position += 1
            if row.position >= row.max_tokens:
                del self._rows[row.key], self._running[row.key]

    def _id(self) -> pb.WorkerId:
        return pb.WorkerId(worker_id=self.worker_id, epoch=EPOCH)


@dataclass(eq=False)
class FakeCluster(rpc.ControllerServicer):
    """The controller and its workers: as many prefill and decode workers as asked for. `address` is the controller's."""

    pace: Pace
    num_prefill: int = 1
    num_decode: int = 1
    address: str = ""
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    registered: asyncio.Queue[pb.Registration] = field(default_factory=asyncio.Queue)

    async def start(self) -> None:
        self._tails: dict[tuple[int, bool], bytes] = {}
        handed_over = pb.HandedOver(bytes=1 << 20, seconds=0.002, exposed=0.001, transport="shm")
        self.handed_over = handed_over.SerializeToString()
        for role, count in ((Role.PREFILL, self.num_prefill), (Role.DECODE, self.num_decode)):
            for number in range(count):
                worker = FakeWorker(self, role, f"{role}-{number}")
                await worker.start()
                self.workers[worker.worker_id] = worker
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        rpc.add_ControllerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await asyncio.gather(self._server.stop(None), *(worker.stop() for worker in self.workers.values()))

    def tail(self, index: int, max_tokens: int) -> bytes:
        """What is said of the token at an index, but for its attempt: position, token, finish."""
        last = index == max_tokens - 1
        tail = self._tails.get((index, last))
        if tail is None:
            tokens = pb.SequenceTokens(position=index, tokens=[token_at(index)], finish="length" if last else "")
            tail = self._tails[index, last] = tokens.SerializeToString()
        return tail

    async def Register(self, request: pb.Registration, context: Context) -> AsyncIterator[pb.Registered]:  # noqa: N802
        self.registered.put_nowait(request)
        yield pb.Registered(accepted=True)
        await asyncio.Event().wait()

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Roster]:  # noqa: N802
        yield pb.Roster(workers=[worker.registration() for worker in self.workers.values()])
        await asyncio.Event().wait()

    async def Kill(self, request: pb.KillRequest, context: Context) -> pb.KillReply:  # noqa: N802
        await context.abort(grpc.StatusCode.UNAVAILABLE, "a worker of a benchmark must not be lost")
        return pb.KillReply()


def _field(number: int, body: bytes) -> bytes:
    """A field of length-delimited type."""
    size = len(body)
    if size < 128:
        return bytes((number << 3 | 2, size)) + body
    length = bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes((number << 3 | 2,)) + length + body
