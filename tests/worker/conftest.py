"""Workers in this process, on real sockets and real shared memory, driven by a router made of plain messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, WorkerConfig
from baton.core.view import Role
from baton.decode_worker.worker import DecodeWorker
from baton.engine.cache import kv_layout
from baton.engine.loader import load_config
from baton.engine.random_model import make_model
from baton.kv_transfer.transport import Header
from baton.prefill_worker.worker import PrefillWorker
from baton.proto import worker_pb2 as pb
from baton.proto import worker_pb2_grpc as rpc
from baton.worker.core import WorkerCore
from baton.worker.process import serve_worker


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight Llama, small enough to build in a moment."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    make_model(out, "1M", seed=3, dtype="float32", max_model_len=256)
    return out


class Controller(rpc.ControllerServicer):
    """Takes registrations and remembers them."""

    def __init__(self) -> None:
        self.registered: dict[str, pb.Registration] = {}
        self.changed = asyncio.Condition()

    async def Register(  # noqa: N802
        self, request: pb.Registration, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.Registered]:
        async with self.changed:
            self.registered[request.worker.worker_id] = request
            self.changed.notify_all()
        yield pb.Registered(accepted=True)
        await asyncio.Event().wait()

    async def address_of(self, worker_id: str) -> pb.Registration:
        async with self.changed:
            await self.changed.wait_for(lambda: worker_id in self.registered)
        return self.registered[worker_id]


@dataclass
class Link:
    """The router's end of one worker's control stream."""

    registration: pb.Registration
    call: grpc.aio.StreamStreamCall[pb.RouterMessage, pb.WorkerMessage]
    channel: grpc.aio.Channel
    seen: list[pb.WorkerMessage] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def send(self, **body: object) -> None:
        await self.call.write(pb.RouterMessage(**body))  # type: ignore[arg-type]

    async def read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for message in self.call:
                async with self.changed:
                    self.seen += (message, *message.more)
                    self.changed.notify_all()

    async def expect(self, body: str, matches: Callable[[pb.WorkerMessage], bool] = lambda _: True) -> pb.WorkerMessage:
        """The first message of this kind that matches, now or later."""

        def find() -> pb.WorkerMessage | None:
            return next((m for m in self.seen if m.WhichOneof("body") == body and matches(m)), None)

        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(lambda: find() is not None)
        found = find()
        assert found is not None
        return found

    def tokens_of(self, request_id: str) -> list[int]:
        """Every token seen for a request, in order of position."""
        parts = [
            (sequence.position, list(sequence.tokens))
            for message in self.seen
            if message.WhichOneof("body") == "tokens"
            for sequence in message.tokens.sequences
            if sequence.attempt.request_id == request_id
        ]
        return [token for _, tokens in sorted(parts) for token in tokens]

    async def finished(self, request_id: str) -> None:
        await self.expect(
            "tokens",
            lambda m: any(s.finish and s.attempt.request_id == request_id for s in m.tokens.sequences),
        )

    async def heartbeat(self) -> pb.Heartbeat:
        """The worker's load right now."""
        stub = rpc.WorkerStub(self.channel)
        call = stub.Heartbeats(pb.HeartbeatRequest(worker_epoch=self.registration.worker.epoch, interval=0.05))
        beat = await call.read()
        call.cancel()
        assert isinstance(beat, pb.Heartbeat)
        return beat

    async def until(self, holds: Callable[[pb.Heartbeat], bool], seconds: float = 5.0) -> pb.Heartbeat:
        """The first heartbeat that `holds`."""
        stub = rpc.WorkerStub(self.channel)
        call = stub.Heartbeats(pb.HeartbeatRequest(worker_epoch=self.registration.worker.epoch, interval=0.05))
        beat = None
        try:
            async with asyncio.timeout(seconds):
                async for beat in call:
                    if holds(beat):
                        return beat
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s; the last heartbeat was {beat}") from None
        finally:
            call.cancel()
        raise AssertionError("the heartbeats ended")


class Rig:
    """Starts workers and connects to them."""

    def __init__(self, model_path: Path, controller: Controller, address: str) -> None:
        self.members: dict[str, WorkerCore] = {}
        self._model_path = model_path
        self._controller = controller
        self._address = address
        self._tasks: list[asyncio.Task[None]] = []
        self._links: list[tuple[Link, asyncio.Task[None]]] = []

    async def start(
        self, role: Role, *, transport: str = "auto", lease: float = 3.0, num_blocks: int = 64, **pool: object
    ) -> Link:
        """A worker of `role`, named after it, and the router's link to it."""
        worker_id = f"{role}-{len(self.members)}"
        block_bytes = kv_layout(load_config(self._model_path), 16, "float32").block_bytes
        config = WorkerConfig(
            worker_id=worker_id,
            cluster="test",
            model=ModelSpec(str(self._model_path), dtype="float32"),
            pool=PoolSpec(role, block_size=16, kv_memory_bytes=num_blocks * block_bytes, max_num_seqs=8, **pool),  # type: ignore[arg-type]
            kv_transfer=KvTransferSpec(transport, lease),
            controller=self._address,
        )
        make = PrefillWorker if role is Role.PREFILL else DecodeWorker

        def make_member(*arguments: object) -> WorkerCore:
            member = make(*arguments)  # type: ignore[arg-type]
            self.members[worker_id] = member
            return member

        self._tasks.append(asyncio.create_task(serve_worker(config, make_member)))  # type: ignore[arg-type]
        return await self.connect(await self._controller.address_of(worker_id))

    def damage(self, link: Link, transport: str) -> None:
        """From now on every push of this worker arrives with one byte changed."""

        def flip(header: Header, data: memoryview) -> None:
            if len(data):
                data[0] ^= 0xFF

        self.members[link.registration.worker.worker_id]._transports[transport]._tamper = flip  # type: ignore[attr-defined]

    async def connect(self, registration: pb.Registration, router_id: str = "router-0", epoch: int = 1) -> Link:
        channel = grpc.aio.insecure_channel(registration.address)
        call = rpc.WorkerStub(channel).Control()
        link = Link(registration, call, channel)
        hello = pb.RouterHello(router_id=router_id, router_epoch=epoch, worker_epoch=registration.worker.epoch)
        await link.send(hello=hello)
        self._links.append((link, asyncio.create_task(link.read())))
        await link.expect("hello")
        return link

    async def close(self) -> None:
        for link, reader in self._links:
            link.call.cancel()
            await reader
            await link.channel.close()
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


@pytest.fixture
async def rig(model_path: Path) -> AsyncIterator[Rig]:
    controller = Controller()
    server = grpc.aio.server()
    rpc.add_ControllerServicer_to_server(controller, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    rig = Rig(model_path, controller, f"127.0.0.1:{port}")
    try:
        yield rig
    finally:
        await rig.close()
        await server.stop(None)


@pytest.fixture
def make_spec() -> Callable[..., pb.SequenceSpec]:
    """Builds the wire form of a greedy sequence."""

    def make(request_id: str, num_prompt: int, max_tokens: int = 8, temperature: float = 0.0) -> pb.SequenceSpec:
        prompt = [3 + (7 * i + len(request_id)) % 200 for i in range(num_prompt)]
        sampling = pb.SamplingSpec(temperature=temperature, top_p=0.95, seed=11, max_tokens=max_tokens)
        return pb.SequenceSpec(attempt=pb.AttemptId(request_id=request_id), prompt=prompt, sampling=sampling)

    return make
