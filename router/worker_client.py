"""The router's end of the streams to one worker: commands and tokens on one, heartbeats on another.

It moves messages and notices when the connection breaks; what a message means is its listener's business.
One client serves one life of a worker: it never talks to another epoch, and once it has reported the worker
lost it has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import Protocol

import grpc

from ..core.request import WorkerRef
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .wire import worker_from

HEARTBEAT_INTERVAL = 0.5  # seconds
HELLO_TIMEOUT = 1.0  # seconds for a connected worker to answer our hello
RECONNECT_TRIES = 3
RECONNECT_PAUSE = 0.2  # seconds between two of them
MAX_MORE = 64  # commands that travel with another one
MAX_DIAL_PAUSE = 2.0  # seconds between tries to reach a worker that was never reached

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A subchannel of its own: no back-off is inherited from an earlier dial to the same address.
    ("grpc.use_local_subchannel_pool", 1),
)

logger = logging.getLogger("baton.router.worker_client")


class WorkerListener(Protocol):
    """Who is told. Every method runs on the event loop and returns at once."""

    def connected(self, client: WorkerClient, hello: pb.WorkerHello, again: bool) -> None:
        """The worker answered. `again`: an earlier stream broke, and everything placed through it is lost."""
        ...

    def received(self, client: WorkerClient, message: pb.WorkerMessage) -> None: ...

    def heartbeat(self, client: WorkerClient, message: pb.Heartbeat) -> None: ...

    def disconnected(self, client: WorkerClient, reason: str) -> None:
        """The stream broke; the client tries to bring it back."""
        ...

    def lost(self, client: WorkerClient, reason: str) -> None:
        """The worker cannot be reached any more. Nothing follows."""
        ...


class WorkerClient:
    """Connection to the worker `ref` at `address`, kept up from `start` until `close` or the worker's loss."""

    def __init__(self, ref: WorkerRef, address: str, router_id: str, router_epoch: int, listener: WorkerListener) -> None:
        self.ref = ref
        self.address = address
        self.up = False
        self._hello = pb.RouterMessage(
            hello=pb.RouterHello(router_id=router_id, router_epoch=router_epoch, worker_epoch=ref.epoch)
        )
        self._listener = listener
        self._outgoing: asyncio.Queue[pb.RouterMessage] = asyncio.Queue()
        self._was_up = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"worker {self.ref}")

    def send(self, message: pb.RouterMessage) -> None:
        """Queue a command. What is queued while the stream is broken is dropped with the attempts it was about."""
        self._outgoing.put_nowait(message)

    async def flush(self) -> None:
        """Wait until everything queued has been written. Never returns while the stream is down: give it a time limit."""
        await self._outgoing.join()

    async def close(self) -> None:
        """End the streams. The listener hears nothing more."""
        task, self._task = self._task, None
        self.up = False
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait([task])

    # ---- connecting ------------------------------------------------------------------------------

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                was_up, reason, final = await self._connect_once()
            except Exception as error:  # a bug of ours: the worker must not hang because of it
                logger.exception("the connection to %s failed", self.ref)
                was_up, reason, final = True, f"the router failed on a message: {type(error).__name__}: {error}", False
            failures = 1 if was_up else failures + 1
            if was_up:
                self._listener.disconnected(self, reason)
            if final or (self._was_up and failures > RECONNECT_TRIES):
                self._listener.lost(self, reason)
                return
            if not was_up:
                pause = RECONNECT_PAUSE if self._was_up else min(MAX_DIAL_PAUSE, RECONNECT_PAUSE * failures)
                await asyncio.sleep(pause * (0.75 + random.random() / 2))

    async def _connect_once(self) -> tuple[bool, str, bool]:
        """One connection from dial to break: (was it up, why it ended, whether trying again is pointless)."""
        was_up = False
        try:
            async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
                stub = rpc.WorkerStub(channel)
                call = stub.Control()
                hello = await self._greet(call)
                if worker_from(hello.worker) != self.ref:
                    return False, f"{self.address} is {worker_from(hello.worker)}, not {self.ref}", True
                was_up = True
                await self._converse(stub, call, hello)
            reason = "the worker closed its control stream"
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            return was_up, reason, self._is_final(error, was_up)
        except TimeoutError as error:
            reason = f"no answer from {self.address}: {error or 'timed out'}"
        finally:
            self.up = False
        return was_up, reason, False

    async def _greet(self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]) -> pb.WorkerHello:
        async with asyncio.timeout(HELLO_TIMEOUT):
            with contextlib.suppress(asyncio.InvalidStateError):  # the call has ended already: `read` says why
                await call.write(self._hello)
            answer = await call.read()
        if not isinstance(answer, pb.WorkerMessage) or answer.WhichOneof("body") != "hello":
            code = await call.code()
            raise TimeoutError(f"the stream ended without a hello ({code.name})")
        return answer.hello

    async def _converse(
        self,
        stub: rpc.WorkerStub,
        call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage],
        hello: pb.WorkerHello,
    ) -> None:
        """Serve an open stream until it breaks."""
        while not self._outgoing.empty():  # meant for the stream before this one
            self._outgoing.get_nowait()
            self._outgoing.task_done()
        again, self._was_up, self.up = self._was_up, True, True
        self._listener.connected(self, hello, again)
        helpers = [asyncio.create_task(self._write(call)), asyncio.create_task(self._listen(stub))]
        try:
            while True:
                message = await call.read()
                if not isinstance(message, pb.WorkerMessage):
                    return
                self._listener.received(self, message)
                for following in message.more:
                    self._listener.received(self, following)
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]) -> None:
        # A write that fails means that the stream broke, which the reader reports.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                message = await self._outgoing.get()
                try:
                    await asyncio.sleep(0)  # what else this turn of the loop has to say goes along: it is the write that costs
                    while not self._outgoing.empty() and len(message.more) < MAX_MORE:
                        message.more.append(self._outgoing.get_nowait())
                    await call.write(message)
                finally:
                    for _ in range(1 + len(message.more)):
                        self._outgoing.task_done()

    async def _listen(self, stub: rpc.WorkerStub) -> None:
        """Heartbeats, for as long as the control stream is up. Their absence is judged by the health monitor."""
        router_id = self._hello.hello.router_id
        request = pb.HeartbeatRequest(worker_epoch=self.ref.epoch, interval=HEARTBEAT_INTERVAL, router_id=router_id)
        while True:
            try:
                async for message in stub.Heartbeats(request):
                    self._listener.heartbeat(self, message)
            except grpc.aio.AioRpcError as error:
                logger.info("heartbeats of %s stopped: %s", self.ref, error.code().name)
            await asyncio.sleep(HEARTBEAT_INTERVAL)

    def _is_final(self, error: grpc.aio.AioRpcError, was_up: bool) -> bool:
        """Another epoch answers there, or nobody listens where a worker was: this life is over."""
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return True
        refused = error.code() == grpc.StatusCode.UNAVAILABLE and "refused" in (error.details() or "").lower()
        return refused and self._was_up and not was_up
