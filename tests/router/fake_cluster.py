"""Workers and a controller without models, for tests of the router: real gRPC servers, invented tokens.

The token at output index `i` of a prompt is `token_at(prompt, i)`, whoever makes it: so a stream that was
interrupted and resumed can be compared with one that was not.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
from baton.core.request import WorkerRef
from baton.core.view import Role
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc

VOCAB = 300

TokenAt = Callable[[tuple[int, ...], int], int]
LOGPROBS = (-0.5, -0.875, -0.25, -0.75)  # of every token of the sequence with this index (modulo 4)


def token_at(prompt: tuple[int, ...], index: int) -> int:
    """Printable ASCII in most byte-level vocabularies."""
    return 40 + (sum(prompt) + 7 * index) % 60


@dataclass(eq=False)
class Running:
    """One sequence at a fake worker."""

    session: asyncio.Queue[pb.WorkerMessage]
    spec: pb.SequenceSpec
    position: int
    target: pb.WorkerId | None = None
    granted: bool = False
    landed: bool = True
    prefilled: bool = False


@dataclass(eq=False)
class FakeWorker(rpc.WorkerServicer):
    """A worker of any role. `open` lets steps happen; clear it to freeze all sequences."""

    cluster: FakeCluster
    role: Role
    worker_id: str
    step_time: float = 0.001
    block_size: int = 16
    total_blocks: int = 64
    epoch: int = field(default_factory=lambda: secrets.randbits(40))
    received: list[pb.RouterMessage] = field(default_factory=list)
    heartbeat: pb.Heartbeat = field(default_factory=lambda: pb.Heartbeat(step=1, free_blocks=64, total_blocks=64))
    beating: bool = True
    refuse_attempts: int = 0  # so many submissions and reservations are answered by a failure
    retriable: bool = True
    skip_position: bool = False  # send the next tokens at a wrong position
    mute_first: bool = False  # prefill, hand over, but never send the first token

    def __post_init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.running: dict[tuple[str, int], Running] = {}
        self.address = ""
        self.sessions: list[asyncio.Queue[pb.WorkerMessage]] = []
        self.batches: list[int] = []  # commands that came in one message
        self._server: grpc.aio.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._message = asyncio.Event()

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.worker_id, self.epoch)

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        rpc.add_WorkerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()
        self._task = asyncio.create_task(self._steps())

    async def die(self) -> None:
        """The process is gone: connections break, the port is closed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(None)
        self.running.clear()
        self._task = self._server = None

    async def break_streams(self) -> None:
        """Cut the control streams, as a worker that drops its sessions does, but live on."""
        self.running.clear()
        for session in self.sessions:
            session.put_nowait(pb.WorkerMessage())
        self.sessions.clear()

    async def until_received(self, kind: str, count: int = 1) -> None:
        while sum(1 for message in self.received if message.WhichOneof("body") == kind) < count:
            self._message.clear()
            await self._message.wait()

    def registration(self) -> pb.Registration:
        worker = pb.WorkerId(worker_id=self.worker_id, epoch=self.epoch)
        return pb.Registration(worker=worker, role=self.role, address=self.address, pid=1, host="test")

    # ---- service ---------------------------------------------------------------------------------

    async def Control(self, messages: AsyncIterator[pb.RouterMessage], context: grpc.aio.ServicerContext):  # noqa: N802
        hello = (await anext(aiter(messages))).hello
        if hello.worker_epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is epoch {self.epoch}")
        session: asyncio.Queue[pb.WorkerMessage] = asyncio.Queue()
        self.sessions.append(session)
        reader = asyncio.create_task(self._read(session, messages))
        try:
            worker = pb.WorkerId(worker_id=self.worker_id, epoch=self.epoch)
            yield pb.WorkerMessage(
                hello=pb.WorkerHello(
                    worker=worker, role=self.role, block_size=self.block_size, total_blocks=self.total_blocks, pid=1
                )
            )
            while (message := await session.get()).WhichOneof("body") is not None:
                yield message
        finally:
            reader.cancel()

    async def Heartbeats(self, request: pb.HeartbeatRequest, context: grpc.aio.ServicerContext):  # noqa: N802
        while True:
            if self.beating:
                yield self.heartbeat
            await asyncio.sleep(0.05)

    async def _read(self, session: asyncio.Queue[pb.WorkerMessage], messages: AsyncIterator[pb.RouterMessage]) -> None:
        async for first in messages:
            self.batches.append(1 + len(first.more))
            for message in (first, *first.more):
                self.received.append(message)
                self._message.set()
                self._handle(session, message)

    def _handle(self, session: asyncio.Queue[pb.WorkerMessage], message: pb.RouterMessage) -> None:
        match message.WhichOneof("body"):
            case "submit":
                if not self._refused(session, message.submit.sequence.attempt):
                    target = message.submit.target if message.submit.HasField("target") else None
                    self._add(Running(session, message.submit.sequence, len(message.submit.sequence.output), target))
            case "reserve":
                spec = message.reserve.sequence
                if not self._refused(session, spec.attempt):
                    self._add(Running(session, spec, len(spec.output) + 1, landed=False, prefilled=True))
                    session.put_nowait(pb.WorkerMessage(granted=pb.Granted(attempt=spec.attempt, ticket=b"ticket")))
            case "grant":
                running = self.running.get(_key(message.grant.attempt))
                if running is not None:
                    running.granted = True
                    self._hand_over(running)
            case "abort":
                self.running.pop(_key(message.abort.attempt), None)

    def _refused(self, session: asyncio.Queue[pb.WorkerMessage], attempt: pb.AttemptId) -> bool:
        if not self.refuse_attempts:
            return False
        self.refuse_attempts -= 1
        failed = pb.AttemptFailed(attempt=attempt, reason="told to", retriable=self.retriable)
        session.put_nowait(pb.WorkerMessage(failed=failed))
        return True

    def _add(self, running: Running) -> None:
        self.running[_key(running.spec.attempt)] = running
        self._work.set()

    # ---- steps -----------------------------------------------------------------------------------

    async def _steps(self) -> None:
        step = 0
        while True:
            await self._work.wait()
            await asyncio.sleep(self.step_time)
            await self.open.wait()
            step += 1
            batches: dict[asyncio.Queue[pb.WorkerMessage], list[pb.SequenceTokens]] = {}
            for running in list(self.running.values()):
                if running.landed and not (running.target is not None and running.prefilled):
                    self._advance(running, batches.setdefault(running.session, []))
            for session, sequences in batches.items():
                if sequences:
                    session.put_nowait(pb.WorkerMessage(tokens=pb.TokenBatch(step=step, sequences=sequences)))
            if not any(running.landed for running in self.running.values()):
                self._work.clear()

    def _advance(self, running: Running, batch: list[pb.SequenceTokens]) -> None:
        spec = running.spec
        token = self.cluster.token_at(tuple(spec.prompt), running.position)
        finish = ""
        if token in spec.sampling.stop_token_ids and running.position + 1 > spec.sampling.min_tokens:
            finish = "stop"
        elif running.position + 1 == spec.sampling.max_tokens:
            finish = "length"
        first = not running.prefilled
        logprobs, of_prompt = [], []
        if spec.sampling.HasField("logprobs"):
            logprobs = [_logprob(token, LOGPROBS[spec.sampling.sequence_index % 4], spec.sampling.logprobs)]
        if spec.sampling.HasField("prompt_logprobs") and running.position == 0:
            entries = enumerate(spec.prompt[1:], 1)
            of_prompt = [_logprob(known, -0.25 * place, spec.sampling.prompt_logprobs) for place, known in entries]
        tokens = pb.SequenceTokens(
            attempt=spec.attempt,
            position=running.position + (5 if self.skip_position else 0),
            tokens=[token],
            logprobs=logprobs,
            finish=finish,
            computing=0.0001 if first else 0.0,
            cached_tokens=3 if first else 0,
            prompt_logprobs=of_prompt,
        )
        if not (self.mute_first and first):
            batch.append(tokens)
        self.skip_position = False
        running.position += 1
        running.prefilled = True
        if finish:
            self.running.pop(_key(spec.attempt), None)
        else:
            self._hand_over(running)

    def _hand_over(self, running: Running) -> None:
        if running.target is None or not running.granted or not running.prefilled:
            return
        self.running.pop(_key(running.spec.attempt), None)
        target = self.cluster.workers.get(running.target.worker_id)
        if target is not None:
            target.land(running.spec.attempt)
        handed = pb.HandedOver(attempt=running.spec.attempt, bytes=4096, seconds=0.002, exposed=0.001, transport="local")
        running.session.put_nowait(pb.WorkerMessage(handed_over=handed))

    def land(self, attempt: pb.AttemptId) -> None:
        running = self.running.get(_key(attempt))
        if running is not None:
            running.landed = True
            running.session.put_nowait(pb.WorkerMessage(adopted=pb.Adopted(attempt=attempt)))
            self._work.set()


def _logprob(token: int, value: float, num_top: int) -> pb.SpecLogprob:
    top = range(num_top)
    return pb.SpecLogprob(token=token, logprob=value, top_tokens=[token + i for i in top], top_logprobs=[value - i for i in top])


@dataclass(eq=False)
class FakeController(rpc.ControllerServicer):
    """A roster, registrations and kills."""

    cluster: FakeCluster
    away: bool = False  # answer no Kill

    def __post_init__(self) -> None:
        self.roster = pb.Roster()
        self.routers: list[pb.Registration] = []
        self.registered: list[pb.Registration] = []
        self.killed: list[pb.KillRequest] = []
        self.address = ""
        self._changed: list[asyncio.Event] = []
        self._server: grpc.aio.Server | None = None
        self.registration = asyncio.Event()

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        rpc.add_ControllerServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    def publish(self, *workers: FakeWorker, dead: tuple[WorkerRef, ...] = ()) -> None:
        self.roster = pb.Roster(
            workers=[worker.registration() for worker in workers],
            dead=[pb.WorkerId(worker_id=ref.worker_id, epoch=ref.epoch) for ref in dead],
            routers=self.routers,
        )
        self._tell()

    async def Register(self, request: pb.Registration, context: grpc.aio.ServicerContext):  # noqa: N802
        self.registered.append(request)
        self.registration.set()
        yield pb.Registered(accepted=True)
        self._list(*self.routers, request)
        try:
            await asyncio.Event().wait()
        finally:
            self._list(*(router for router in self.routers if router != request))

    def _list(self, *routers: pb.Registration) -> None:
        """These routers are alive."""
        self.routers = list(routers)
        self.roster = pb.Roster(workers=self.roster.workers, dead=self.roster.dead, routers=routers)
        self._tell()

    def _tell(self) -> None:
        for changed in self._changed:
            changed.set()

    async def Watch(self, request: pb.WatchRequest, context: grpc.aio.ServicerContext):  # noqa: N802
        changed = asyncio.Event()
        self._changed.append(changed)
        try:
            while True:
                yield self.roster
                await changed.wait()
                changed.clear()
        finally:
            self._changed.remove(changed)

    async def Kill(self, request: pb.KillRequest, context: grpc.aio.ServicerContext) -> pb.KillReply:  # noqa: N802
        self.killed.append(request)
        if self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        worker = self.cluster.workers.get(request.worker.worker_id)
        if worker is not None and worker.epoch == request.worker.epoch:
            await worker.die()
        return pb.KillReply(dead=True)


@dataclass(eq=False)
class FakeCluster:
    """Workers and their controller."""

    token_at: TokenAt = token_at
    workers: dict[str, FakeWorker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.controller = FakeController(self)

    async def add(self, role: Role, worker_id: str) -> FakeWorker:
        """Start a worker and put it on the roster."""
        worker = FakeWorker(self, role, worker_id)
        await worker.start()
        self.workers[worker_id] = worker
        self.publish()
        return worker

    async def replace(self, worker_id: str) -> FakeWorker:
        """Start a new life of a worker that died; the old one is on the roster as dead."""
        old = self.workers[worker_id]
        await old.die()
        new = FakeWorker(self, old.role, worker_id)
        await new.start()
        self.workers[worker_id] = new
        self.publish(dead=(old.ref,))
        return new

    def publish(self, dead: tuple[WorkerRef, ...] = ()) -> None:
        self.controller.publish(*self.workers.values(), dead=dead)

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.die()
        await self.controller.stop()


def expected_tokens(prompt: tuple[int, ...], count: int) -> list[int]:
    return [token_at(prompt, index) for index in range(count)]


@contextlib.asynccontextmanager
async def running_cluster(*roles: Role, token_at: TokenAt = token_at) -> AsyncIterator[FakeCluster]:
    """A controller and one worker per role, named p0, d1, m2, ..."""
    cluster = FakeCluster(token_at)
    await cluster.controller.start()
    try:
        for number, role in enumerate(roles):
            await cluster.add(role, f"{role[0]}{number}")
        yield cluster
    finally:
        await cluster.close()


def _key(attempt: pb.AttemptId) -> tuple[str, int]:
    return attempt.request_id, attempt.number
