"""The shell around a worker: its gRPC server, router sessions, heartbeats, the reaper and the registration.

It knows nothing of prefill or decode: what a message means is the business of the `Member` inside.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ..core.clock import Clock
from ..core.observed import ObservedStep
from ..core.request import WorkerRef
from ..core.view import Role, WorkerLoad
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .messages import heartbeat_to, step_to, worker_to
from .registration import stay_registered
from .sessions import Session, Sessions

ROUTER_GRACE = 5.0  # seconds that a router's attempts outlive its stream
TICK = 0.5  # seconds between runs of the reaper

logger = logging.getLogger("baton.worker")

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
)


class Member(Protocol):
    """The worker inside the shell. Every method runs on the event loop and returns at once, but for `run`."""

    def handle(self, session: Session, message: pb.RouterMessage) -> None:
        """A command of a router."""
        ...

    def router_gone(self, session: Session) -> None:
        """Give up everything that belongs to this session."""
        ...

    def tick(self, now: float) -> None:
        """The reaper's turn: expire what has outlived its lease."""
        ...

    def load(self) -> WorkerLoad: ...

    def steps(self) -> Sequence[ObservedStep]:
        """A sample of the steps that ran."""
        ...

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add the services of the data plane."""
        ...

    async def run(self) -> None:
        """Work until cancelled."""
        ...

    async def close(self) -> None: ...


class WorkerHost(rpc.WorkerServicer):
    """Serves one member until it is told to stop."""

    def __init__(self, ref: WorkerRef, role: Role, block_size: int, num_blocks: int, sessions: Sessions, clock: Clock) -> None:
        self._ref = ref
        self._role = role
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._sessions = sessions
        self._clock = clock
        self._draining = False
        self._member: Member | None = None

    async def serve(
        self, server: grpc.aio.Server, member: Member, registration: pb.Registration, controller: str, orphan_grace: float
    ) -> None:
        """Serve `member` on `server` (bound, not started) until a signal, a refused registration or a failure."""
        self._member = member
        rpc.add_WorkerServicer_to_server(self, server)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        member.add_services(server)
        await server.start()
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        stop = asyncio.Event()
        _on_signals(stop)
        tasks = [
            asyncio.create_task(member.run(), name="engine"),
            asyncio.create_task(self._reap(), name="reaper"),
            asyncio.create_task(stay_registered(controller, lambda: registration, orphan_grace), name="registration"),
            asyncio.create_task(stop.wait(), name="stop"),
        ]
        logger.info("%s (%s) serves on %s", self._ref, self._role, registration.address)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await server.stop(0.2)
            await member.close()

    # ---- control stream ------------------------------------------------------------------------

    async def Control(  # noqa: N802 (the name is the service's)
        self,
        request_iterator: AsyncIterator[pb.RouterMessage],
        context: grpc.aio.ServicerContext[pb.RouterMessage, pb.WorkerMessage],
    ) -> AsyncIterator[pb.WorkerMessage]:
        hello = await anext(aiter(request_iterator), None)
        if hello is None or hello.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message of a control stream must be a hello")
            return  # never reached: abort raises
        if hello.hello.worker_epoch != self._ref.epoch:
            detail = f"this is {self._ref}, not epoch {hello.hello.worker_epoch:x}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, detail)
        session = self._open(hello.hello)
        reader = asyncio.create_task(self._read(session, request_iterator))
        reader.add_done_callback(lambda _: session.outgoing.put_nowait(pb.WorkerMessage()))  # wakes the loop below
        try:
            yield self._hello()
            while not reader.done():
                message = await session.next_message()
                if message.WhichOneof("body") is not None:
                    yield message
        finally:
            reader.cancel()
            if session.broken_at is None:
                session.broken_at = self._clock.now()
                logger.info("control stream of router %s ended", session.router_id)

    async def _read(self, session: Session, messages: AsyncIterator[pb.RouterMessage]) -> None:
        async for first in messages:
            for message in (first, *first.more):
                if session.broken_at is not None:
                    return  # the router has dialled again: what this stream still carries is about attempts that are given up
                self._handle(session, message)

    def _handle(self, session: Session, message: pb.RouterMessage) -> None:
        if message.WhichOneof("body") == "drain":
            self._draining = True
        elif self._member is not None:
            try:
                self._member.handle(session, message)
            except Exception:  # one bad command must not cut the stream for everybody else's requests
                logger.exception("command %s of router %s failed", message.WhichOneof("body"), session.router_id)

    def _open(self, hello: pb.RouterHello) -> Session:
        session, replaced = self._sessions.open(hello.router_id, hello.router_epoch)
        for old in replaced:
            self._give_up(old)
        logger.info("router %s (epoch %x) connected", hello.router_id, hello.router_epoch)
        return session

    def _give_up(self, session: Session) -> None:
        session.broken_at = session.broken_at or self._clock.now()
        if self._member is not None:
            self._member.router_gone(session)
        self._sessions.close(session)

    def _hello(self) -> pb.WorkerMessage:
        return pb.WorkerMessage(
            hello=pb.WorkerHello(
                worker=worker_to(self._ref),
                role=self._role,
                block_size=self._block_size,
                total_blocks=self._num_blocks,
                pid=os.getpid(),
            )
        )

    # ---- heartbeats and the reaper --------------------------------------------------------------

    async def Heartbeats(  # noqa: N802
        self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext[pb.HeartbeatRequest, pb.Heartbeat]
    ) -> AsyncIterator[pb.Heartbeat]:
        if request.worker_epoch != self._ref.epoch or self._member is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is {self._ref}, not epoch {request.worker_epoch:x}")
            return
        while True:
            yield heartbeat_to(self._sessions.beside(request.router_id, self._member.load()), self._draining)
            await asyncio.sleep(max(0.05, request.interval or 0.5))

    async def GetSteps(  # noqa: N802
        self, request: pb.StepsRequest, context: grpc.aio.ServicerContext[pb.StepsRequest, pb.ObservedSteps]
    ) -> pb.ObservedSteps:
        return pb.ObservedSteps(steps=[] if self._member is None else map(step_to, self._member.steps()))

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = self._clock.now()
            for session in self._sessions.expired(now, ROUTER_GRACE):
                logger.warning("router %s has been away for %g s: its attempts end", session.router_id, ROUTER_GRACE)
                self._give_up(session)
            if self._member is not None:
                self._member.tick(now)


def _on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set `stop`. Outside the main thread (inside a Ray actor) signals are not ours."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, stop.set)
        except (RuntimeError, ValueError):
            return
