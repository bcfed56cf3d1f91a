"""The sending side of the side channel: one long-lived gRPC stream per peer, shared by the shm and grpc transports.

A link dials when it is needed, with back-off, and when it breaks everybody who waits for that peer, and nobody
else, gets PeerLost. A peer that makes no progress for `patience` seconds counts as lost, so nothing hangs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc

from ..core.errors import PeerLost, TransferDamaged, TransferError
from ..core.kv import Endpoint
from ..core.request import WorkerRef
from .frames import METHOD_NAME, METHOD_SERVICE, Kind, Reply, Request, Status
from .transport import Header

PATIENCE = 5.0  # seconds without any progress after which a peer is lost
MAX_IN_FLIGHT = 128 << 20  # bytes pushed to one peer and not yet acknowledged
STOP_PATIENCE = 30.0  # seconds for which the delivery of a stop is tried
FIRST_DELAY, LAST_DELAY = 0.05, 1.0  # seconds between attempts to dial

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel dials afresh instead of inheriting an old back-off
    ("grpc.http2.lookahead_bytes", 8 << 20),
)

logger = logging.getLogger("baton.kv_transfer")

T = TypeVar("T")


class PeerLinks:
    """The links of one worker, made as they are needed. All methods run on one event loop."""

    def __init__(self, patience: float = PATIENCE, max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._patience = patience
        self._max_in_flight = max_in_flight
        self._links: dict[tuple[WorkerRef, str], Link] = {}

    def to(self, endpoint: Endpoint) -> Link:
        """The link to one life of a worker; idle links without a connection are forgotten."""
        key = (endpoint.worker, endpoint.address)
        link = self._links.get(key)
        if link is None:
            self._links = {k: other for k, other in self._links.items() if other.in_use}
            link = self._links[key] = Link(endpoint.address, self._patience, self._max_in_flight)
        return link

    async def close(self) -> None:
        """Close every connection; pushes that still wait raise PeerLost. May be called more than once."""
        links, self._links = self._links, {}
        await asyncio.gather(*(link.close() for link in links.values()))


class Link:
    """One peer: the connection to it if there is one, and the budget of bytes in flight."""

    def __init__(self, address: str, patience: float, max_in_flight: int) -> None:
        self.budget = Budget(max_in_flight)
        self._address = address
        self._patience = patience
        self._connection: Connection | None = None
        self._dialling: asyncio.Task[Connection] | None = None
        self._delay = 0.0
        self._num_users = 0

    @property
    def in_use(self) -> bool:
        """Whether there is a connection, or somebody who wants one."""
        return self._connection is not None or self._num_users > 0

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Connection]:
        """The connection to the peer. Raises PeerLost when it cannot be reached."""
        self._num_users += 1
        try:
            yield await self._connect()
        finally:
            self._num_users -= 1

    async def stop(self, header: Header) -> None:
        """Deliver a STOP, over several connections if need be; gives up after STOP_PATIENCE."""
        loop = asyncio.get_running_loop()
        until = loop.time() + STOP_PATIENCE
        while True:
            try:
                async with self.connected() as connection, connection.conversation() as talk:
                    await talk.send(Kind.STOP, header)
                    await talk.reply()
                return
            except PeerLost as error:
                if loop.time() >= until:
                    logger.warning("stop of %s not delivered to %s: %s", header.attempt, self._address, error)
                    return
                await asyncio.sleep(FIRST_DELAY)
            except TransferError as error:
                logger.warning("stop of %s refused by %s: %s", header.attempt, self._address, error)
                return

    async def close(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            await self._connection.close("this worker is closing")

    async def _connect(self) -> Connection:
        if self._connection is not None:
            return self._connection
        dialling = self._dialling
        if dialling is None:  # one attempt for everybody who waits
            dialling = self._dialling = asyncio.create_task(self._dial())
            dialling.add_done_callback(_retrieve)
        try:
            return await asyncio.shield(dialling)
        except asyncio.CancelledError:
            if dialling.cancelled():
                raise PeerLost(f"the link to {self._address} is closed") from None
            raise

    async def _dial(self) -> Connection:
        try:
            if self._delay:
                await asyncio.sleep(self._delay * (0.5 + random.random() / 2))
            self._delay = min(max(2 * self._delay, FIRST_DELAY), LAST_DELAY)  # until the peer has answered something
            channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
            try:
                await asyncio.wait_for(_ready(channel, self._address), self._patience)
            except (TimeoutError, PeerLost) as error:
                await channel.close(None)
                raise PeerLost(str(error) or f"{self._address} did not answer in {self._patience:g} s") from error
            except asyncio.CancelledError:
                await channel.close(None)
                raise
            self._connection = Connection(channel, self._address, self._patience, self._answered, self._broken)
            return self._connection
        finally:
            self._dialling = None

    def _answered(self) -> None:
        self._delay = 0.0

    def _broken(self) -> None:
        self._connection = None


class Connection:
    """One stream to a peer, for as long as it holds."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        address: str,
        patience: float,
        answered: Callable[[], None],
        broken: Callable[[], None],
    ) -> None:
        self._when_closed: list[Callable[[], None]] = [broken]
        self._channel = channel
        self._address = address
        self._patience = patience
        self._answered = answered
        self._call = channel.stream_stream(f"/{METHOD_SERVICE}/{METHOD_NAME}", None, None)(None)
        self._writing = asyncio.Lock()
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._number = 0
        self._progress = asyncio.get_running_loop().time()
        self._lost: str | None = None
        self._reader = asyncio.create_task(self._read())
        self._closing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def conversation(self) -> AsyncIterator[Conversation]:
        """A number of its own for one push or stop."""
        self.check_alive()
        self._number += 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._replies[self._number] = future
        number = self._number
        try:
            yield Conversation(self, number, future)
        finally:
            self._replies.pop(number, None)

    def check_alive(self) -> None:
        """Raise PeerLost when the connection has ended."""
        if self._lost is not None:
            raise PeerLost(self._lost)

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Call back when the connection ends: what was learnt of the peer over it is void then."""
        if self._lost is None:
            self._when_closed.append(callback)
        else:
            callback()

    async def send(self, frame: bytes) -> None:
        """Write one frame. Raises PeerLost. A frame is never cut short, even when the caller is cancelled."""
        async with self._writing:
            self.check_alive()
            write = asyncio.ensure_future(self._call.write(frame))
            try:
                await to_the_end(write, self._patience)
            except TimeoutError:
                self._break(f"it takes no bytes for {self._patience:g} s")
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                self._break(_said(error))
            self.check_alive()
            self._progress = asyncio.get_running_loop().time()

    async def reply(self, future: asyncio.Future[Reply]) -> Reply:
        """Wait for one reply, for as long as the peer makes any progress."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        while not future.done():
            left = max(started, self._progress) + self._patience - loop.time()
            if left <= 0:
                self._break(f"it answers nothing for {self._patience:g} s")
                break
            await asyncio.wait([future], timeout=left)
        return future.result()

    async def close(self, reason: str) -> None:
        self._break(reason)
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _read(self) -> None:
        reason = "it closed the stream"
        try:
            while isinstance(frame := await self._call.read(), bytes):  # else the end of the stream
                reply = Reply.unpack(frame)
                self._progress = asyncio.get_running_loop().time()
                self._answered()
                future = self._replies.get(reply.number)
                if future is not None and not future.done():
                    future.set_result(reply)
        except (grpc.aio.AioRpcError, TransferDamaged) as error:
            reason = _said(error)
        except asyncio.CancelledError:
            # Cancelling the call ends a read in the same way as cancelling this task does.
            reason = "the stream was cancelled"
        self._break(reason)

    def _break(self, reason: str) -> None:
        if self._lost is not None:
            return
        self._lost = f"lost the connection to {self._address}: {reason}"
        for number, future in self._replies.items():
            if not future.done():
                future.set_result(Reply(number, Status.LOST, self._lost))
        for callback in self._when_closed:
            callback()
        self._call.cancel()
        self._closing = asyncio.create_task(self._shut())

    async def _shut(self) -> None:
        if self._reader is not asyncio.current_task():
            self._reader.cancel()
            await asyncio.wait([self._reader])
        await self._channel.close(None)


class Conversation:
    """The frames of one push or stop and the answer to it."""

    def __init__(self, connection: Connection, number: int, future: asyncio.Future[Reply]) -> None:
        self._connection = connection
        self._number = number
        self._future = future

    async def send(
        self,
        kind: Kind,
        header: Header,
        runs: tuple[tuple[int, int], ...] = (),
        checksum: int | None = None,
        payload: tuple[memoryview, ...] = (),
    ) -> None:
        """Write one frame. Raises at once what the peer has already answered against this push."""
        if self._future.done():
            self._future.result().raise_for_status()
        await self._connection.send(Request(kind, self._number, header, runs, checksum).pack(payload))

    async def reply(self) -> None:
        """Return when the peer has accepted it. Raises TransferRefused, TransferDamaged or PeerLost."""
        reply = await self._connection.reply(self._future)
        reply.raise_for_status()


class Budget:
    """At most `limit` bytes at a time, first come first served; something larger goes alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self.num_used = 0

    @asynccontextmanager
    async def take(self, num_bytes: int) -> AsyncIterator[None]:
        """Hold `num_bytes` of the budget, waiting for them in turn."""
        if self._waiting or not self._fits(num_bytes):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((num_bytes, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give(num_bytes)
                else:
                    self._waiting.remove((num_bytes, turn))
                    self._wake()
                raise
        else:
            self.num_used += num_bytes
        try:
            yield
        finally:
            self._give(num_bytes)

    def _fits(self, num_bytes: int) -> bool:
        return self.num_used == 0 or self.num_used + num_bytes <= self._limit

    def _give(self, num_bytes: int) -> None:
        self.num_used -= num_bytes
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            num_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self.num_used += num_bytes
                turn.set_result(None)


async def to_the_end(future: asyncio.Future[T], timeout: float | None = None) -> T:
    """Wait for `future` even when the caller is cancelled meanwhile; then raise the cancellation.

    For work that cannot be taken back half done. Raises TimeoutError after `timeout` seconds, leaving the work alone.
    """
    loop = asyncio.get_running_loop()
    until = None if timeout is None else loop.time() + timeout
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        left = None if until is None else until - loop.time()
        if left is not None and left <= 0:
            future.add_done_callback(_retrieve)
            raise TimeoutError
        try:
            await asyncio.wait([future], timeout=left)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _retrieve(future)
        raise cancelled
    return future.result()


def _retrieve(future: asyncio.Future[T]) -> None:
    if not future.cancelled():
        future.exception()


async def _ready(channel: grpc.aio.Channel, address: str) -> None:
    """Return when the channel is connected. Raises PeerLost as soon as one attempt has failed."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            raise PeerLost(f"{address} cannot be reached")
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)


def _said(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name} {error.details()}"
    return str(error) or type(error).__name__
