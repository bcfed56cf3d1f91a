"""Two workers with small pools: what the tests of the transports share."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import msgpack
import pytest
import torch
from baton.core.errors import TransferRefused
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, WorkerRef
from baton.kernels.device import Device, HostDevice
from baton.kv_transfer.cuda_ipc import gpu_of
from baton.kv_transfer.device_pool import DevicePool
from baton.kv_transfer.peer import add_peer_service
from baton.kv_transfer.plan import plan_copies
from baton.kv_transfer.pool import PoolMemory
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note, TransferStats, Transport
from torch import Tensor

LAYOUT = KVLayout(num_layers=2, num_kv_heads=4, head_dim=64, block_size=32, dtype="float32")  # 128 KiB a block
NUM_BLOCKS = 64
SOURCE = WorkerRef("prefill-0", 7)
TARGET = WorkerRef("decode-0", 9)


@dataclass
class RecordingSink:
    """Accepts the headers of live tickets and remembers what it was told."""

    live: dict[Attempt, Ticket] = field(default_factory=dict)
    landings: list[Header] = field(default_factory=list)
    damages: list[Header] = field(default_factory=list)
    stops: list[tuple[WorkerRef, Attempt]] = field(default_factory=list)
    stop_seen: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self, header: Header) -> None:
        ticket = self.live.get(header.attempt)
        if ticket is None or (header.source, header.target, header.generation) != (
            ticket.source,
            ticket.target,
            ticket.generation,
        ):
            raise TransferRefused(f"no such ticket: {header}")

    def landed(self, header: Header) -> None:
        self.check(header)
        self.landings.append(header)

    def damaged(self, header: Header, reason: str) -> None:
        self.damages.append(header)
        self.live.pop(header.attempt, None)

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        self.stops.append((source, attempt))
        self.stop_seen.set()


@dataclass
class Target:
    """A receiving worker: in this process with a server of its own, or in a child process (then without a sink)."""

    endpoint: Endpoint
    memory: PoolMemory  # the pool's bytes, also where the worker takes them for a device's
    sink: RecordingSink
    server: grpc.aio.Server | None = None
    process: subprocess.Popen[str] | None = None

    def ticket(self, name: str, blocks: tuple[int, ...], num_held: int = 0, generation: int = 1) -> Ticket:
        """A ticket that this worker accepts."""
        ticket = Ticket(
            Attempt(name, 1),
            SOURCE,
            self.endpoint.worker,
            blocks,
            num_held,
            len(blocks) * LAYOUT.block_size,
            generation,
            3.0,
            (self.endpoint,),
        )
        self.sink.live[ticket.attempt] = ticket
        return ticket

    def block(self, index: int) -> bytes:
        start = index * LAYOUT.block_bytes
        return bytes(self.memory.buffer[start : start + LAYOUT.block_bytes])

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
        self.memory.close()


@dataclass
class Source:
    """A sending worker's pool, full of random bytes."""

    memory: PoolMemory

    def block(self, index: int) -> bytes:
        start = index * LAYOUT.block_bytes
        return bytes(self.memory.buffer[start : start + LAYOUT.block_bytes])

    async def push(
        self, transport: Transport, ticket: Ticket, blocks: tuple[int, ...], note: Note | None = None
    ) -> TransferStats:
        """Push `blocks` (a table from position 0) under `ticket`; all of them and the first token unless `note` says less."""
        if note is None:
            note = Note(ticket.num_held, len(ticket.blocks) - ticket.num_held, last=True, first_token=42)
        copies = plan_copies([LAYOUT], [LAYOUT], blocks, ticket.blocks, ticket.num_tokens, note.first_block, note.num_blocks)
        return await transport.push(copies, ticket, note)


@pytest.fixture
def source() -> Source:
    memory = PoolMemory.private(NUM_BLOCKS * LAYOUT.block_bytes)
    memory.buffer[:] = random.Random(1).randbytes(memory.num_bytes)
    return Source(memory)


ON_DEVICES = ("cuda_ipc", "grpc_between_devices", "torch_dist_between_devices")


def as_device_pool(memory: PoolMemory, device: Device = HostDevice()) -> DevicePool:
    """The same bytes, used as if they were on a device."""
    return DevicePool(torch.frombuffer(memory.buffer, dtype=torch.uint8), LAYOUT.block_bytes, device)


def handle_on(path: str) -> bytes:
    """A handle whose GPU is called like a file of shared memory."""
    handle: bytes = msgpack.packb((path, 0, 0, []))
    return handle


class SharedMappings:
    """In the place of CUDA IPC: handles name shared memory, tensors of the CPU lie over it."""

    def reaches(self, handle: bytes) -> bool:
        return bool(handle)

    def open(self, handle: bytes) -> Tensor:
        return torch.frombuffer(PoolMemory.open(gpu_of(handle), NUM_BLOCKS * LAYOUT.block_bytes).buffer, dtype=torch.uint8)


StartTarget = Callable[..., Awaitable[Target]]


@pytest.fixture
async def start_target(request: pytest.FixtureRequest) -> AsyncIterator[StartTarget]:
    """Starts receiving workers and ends them after the test. Their pools are a device's if the transport is."""
    targets: list[Target] = []

    named = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None

    def endpoint_at(worker: WorkerRef, address: str, path: str, on_device: bool) -> Endpoint:
        where = ("", NUM_BLOCKS, LAYOUT, handle_on(path)) if on_device else (path, NUM_BLOCKS, LAYOUT)
        return Endpoint(worker, address, host_identity(), *where)

    async def in_process(worker: WorkerRef, port: int, on_device: bool) -> Target:
        memory = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
        sink = RecordingSink()
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)])
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
        add_peer_service(server, as_device_pool(memory) if on_device else memory, worker, sink, True)
        await server.start()
        endpoint = endpoint_at(worker, f"127.0.0.1:{bound}", memory.path, on_device)
        return Target(endpoint, memory, sink, server=server)

    def spawn(worker: WorkerRef, on_device: bool) -> tuple[subprocess.Popen[str], str]:
        script = Path(__file__).with_name("peer_process.py")
        where = "device" if on_device else "host"
        arguments = [worker.worker_id, str(worker.epoch), str(NUM_BLOCKS), str(LAYOUT.block_bytes), where]
        process = subprocess.Popen([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        return process, process.stdout.readline()

    async def as_child(worker: WorkerRef, on_device: bool) -> Target:
        process, line = await asyncio.to_thread(spawn, worker, on_device)
        said = json.loads(line)
        endpoint = endpoint_at(worker, said["address"], said["path"], on_device)
        memory = PoolMemory.open(said["path"], NUM_BLOCKS * LAYOUT.block_bytes)
        return Target(endpoint, memory, RecordingSink(), process=process)

    async def start(
        worker: WorkerRef = TARGET, port: int = 0, child: bool = False, on_device: bool = named in ON_DEVICES
    ) -> Target:
        target = await (as_child(worker, on_device) if child else in_process(worker, port, on_device))
        targets.append(target)
        return target

    yield start
    for target in targets:
        await target.stop()


@pytest.fixture
async def target(start_target: StartTarget) -> Target:
    return await start_target()


@pytest.fixture
def refused_variants() -> list[tuple[str, Callable[[Ticket], Ticket]]]:
    """Ways in which a ticket can be stale."""
    return [
        ("another epoch of the source", lambda t: replace(t, source=WorkerRef(SOURCE.worker_id, SOURCE.epoch + 1))),
        ("another epoch of the target", lambda t: replace(t, target=WorkerRef(TARGET.worker_id, TARGET.epoch + 1))),
        ("another generation", lambda t: replace(t, generation=t.generation + 1)),
        ("another attempt", lambda t: replace(t, attempt=Attempt(t.attempt.request_id, t.attempt.number + 1))),
    ]
