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

    router: str
    attempt: bytes  # serialised, as field 1 of what is said of it
    max_tokens: int
    key: bytes
    position: int = 0
    target: str = ""
    granted: bool = False
    prefilled: bool = False
    landed: bool = False


class Link:
    """What a worker knows of one router: the sequences it asked for, and what is to be said to it."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.running: dict[bytes, Row] = {}  # those that a decode step advances
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()

    @property
    def can_step(self) -> bool:
        """It has something to run, and has taken what was sent before."""
        return bool(self.running) and self.outgoing.qsize() <= 1


class FakeWorker:
    """A worker of one role. Every router has a link of its own; a router that dials again begins anew."""

    def __init__(self, cluster: FakeCluster, role: Role, worker_id: str) -> None:
        self._cluster = cluster
        self._pace = cluster.pace
        self._role = role
        self.worker_id = worker_id
        self.address = ""
        self._links: dict[str, Link] = {}  # by router
        self._fresh: list[Row] = []  # to be prefilled
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
        link = self._links[row.router]
        mine = link.rows.get(row.key)
        if mine is not None:
            mine.landed = True
            link.outgoing.put_nowait(_field(4, row.attempt))
            link.running[mine.key] = mine
            self._work.set()

    # ---- service ---------------------------------------------------------------------------------

    async def _control(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        router = pb.RouterMessage.FromString(await anext(messages)).hello.router_id
        link = self._links[router] = Link()
        reader = asyncio.create_task(self._read(router, messages))
        hello = pb.WorkerHello(worker=self._id(), role=self._role, block_size=BLOCK_SIZE, total_blocks=TOTAL_BLOCKS, pid=1)
        yield pb.WorkerMessage(hello=hello).SerializeToString()
        try:
            while True:
                message = await link.outgoing.get()
                await asyncio.sleep(0)
                more = []
                while not link.outgoing.empty():
                    more.append(_field(MORE, link.outgoing.get_nowait()))
                yield message + b"".join(more)
        finally:
            reader.cancel()

    async def _heartbeats(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        beat = pb.Heartbeat(step=1, prefill_rate=1e6, decode_step=0.001, free_blocks=TOTAL_BLOCKS, total_blocks=TOTAL_BLOCKS)
        while True:
            beat.num_running = sum(len(link.running) for link in self._links.values())
            yield beat.SerializeToString()
            await asyncio.sleep(0.5)

    async def _read(self, router: str, messages: AsyncIterator[bytes]) -> None:
        async for data in messages:
            first = pb.RouterMessage.FromString(data)
            for message in (first, *first.more):
                self._handle(router, self._links[router], message)

    def _handle(self, router: str, link: Link, message: pb.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "submit":
                row = _row(router, link, message.submit.sequence)
                row.target = message.submit.target.worker_id
                if not self._fresh:
                    asyncio.get_running_loop().call_soon(self._prefill, time.monotonic())
                self._fresh.append(row)
            case "reserve":
                row = _row(router, link, message.reserve.sequence)
                row.position = 1
                link.outgoing.put_nowait(_field(3, row.attempt + _field(2, TICKET)))
            case "grant":
                known = link.rows.get(message.grant.attempt.SerializeToString())
                if known is not None:
                    known.granted = True
                    self._hand_over(known)
            case "abort":
                key = message.abort.attempt.SerializeToString()
                link.rows.pop(key, None)
                link.running.pop(key, None)

    # ---- steps -----------------------------------------------------------------------------------

    def _prefill(self, began: float) -> None:
        """One step over everything that has come meanwhile."""
        rows, self._fresh = self._fresh, []
        batches: dict[str, list[bytes]] = {}
        computing = pb.SequenceTokens(computing=time.monotonic() - began).SerializeToString()
        for row in rows:
            sequence = _field(2, row.attempt + self._cluster.tail(0, row.max_tokens) + computing)
            batches.setdefault(row.router, []).append(sequence)
            row.position, row.prefilled = 1, True
            self._pace.sent += 1
        for router, sequences in batches.items():
            self._links[router].outgoing.put_nowait(_field(2, b"".join(sequences)))
        for row in rows:
            link = self._links[row.router]
            if row.max_tokens == 1:
                link.rows.pop(row.key, None)
            elif row.target:
                self._hand_over(row)
            else:
                link.running[row.key] = row
                self._work.set()

    def _hand_over(self, row: Row) -> None:
        link = self._links[row.router]
        if row.granted and row.prefilled and link.rows.pop(row.key, None) is not None:
            self._cluster.workers[row.target].land(row)
            link.outgoing.put_nowait(_field(5, row.attempt + self._cluster.handed_over))

    async def _step_for_ever(self) -> None:
        pace = self._pace
        due = 0.0
        while True:
            await self._work.wait()
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            while not (links := self._steppable()) or (pace.window and pace.sent - pace.received > pace.window):
                if not any(link.running for link in self._links.values()):
                    break  # aborted, all of them
                await asyncio.sleep(POLL)
            due = max(due + pace.step, time.monotonic() - pace.step)
            for link in links:
                rows = list(link.running.values())
                link.outgoing.put_nowait(_field(2, b"".join(self._advance(link, rows))))
                pace.sent += len(rows)
            if not any(link.running for link in self._links.values()):
                self._work.clear()

    def _steppable(self) -> list[Link]:
        return [link for link in self._links.values() if link.can_step]

    def _advance(self, link: Link, rows: list[Row]) -> Iterator[bytes]:
        tail = self._cluster.tail
        for row in rows:
            yield _field(2, row.attempt + tail(row.position, row.max_tokens))
            row.position += 1
            if row.position >= row.max_tokens:
                del link.rows[row.key], link.running[row.key]

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


def _row(router: str, link: Link, spec: pb.SequenceSpec) -> Row:
    key = spec.attempt.SerializeToString()
    row = link.rows[key] = Row(router, _field(1, key), spec.sampling.max_tokens, key)
    return row


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
