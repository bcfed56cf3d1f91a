"""How fast KV moves between two workers of this machine, by transport: real pushes into a second process, acknowledged by it."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc

from ..core.errors import InternalError, Unavailable
from ..core.kv import Endpoint, KVLayout
from ..core.request import Attempt, WorkerRef
from ..kv_transfer.peer import add_peer_service
from ..kv_transfer.plan import plan_copies
from ..kv_transfer.pool import PoolMemory
from ..kv_transfer.registry import host_identity
from ..kv_transfer.ticket import Ticket
from ..kv_transfer.transport import Header, Note
from ..kv_transfer.transports import make_transports

LAYOUT = KVLayout(num_layers=12, num_kv_heads=4, head_dim=64, block_size=32, dtype="bfloat16")  # 384 KiB a block
NUM_BLOCKS = 86  # 32 MiB
SOURCE, TARGET = WorkerRef("source", 1), WorkerRef("target", 1)
START_SECONDS = 60.0  # allowed to the second process until it listens


def measure_links(rounds: int = 5, checksum: bool = True) -> dict[str, float]:
    """Bytes per second of each transport, the median over rounds of 32 MiB each.

    Raises Unavailable when the second process does not come up.
    """
    with _second_process(checksum) as endpoint:
        return asyncio.run(_measure(endpoint, rounds, checksum))


async def _measure(endpoint: Endpoint, rounds: int, checksum: bool) -> dict[str, float]:
    memory = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
    transports = make_transports(endpoint, memory, checksum)
    table = tuple(range(NUM_BLOCKS))
    num_tokens = NUM_BLOCKS * LAYOUT.block_size
    ticket = Ticket(Attempt("profile", 1), SOURCE, TARGET, table, 0, num_tokens, 1, 3.0, (endpoint,))
    copies = plan_copies([LAYOUT], [LAYOUT], table, table, num_tokens)
    rates: dict[str, list[float]] = {name: [] for name in transports}
    try:
        for number in range(rounds + 1):
            for name, transport in transports.items():
                stats = await transport.push(copies, ticket, Note(0, NUM_BLOCKS))
                if number:  # the first push dials, maps, and fills the page tables
                    rates[name].append(stats.num_bytes / stats.seconds)
    finally:
        for transport in transports.values():
            await transport.close()
        memory.close()
    return {name: statistics.median(values) for name, values in rates.items()}


@contextmanager
def _second_process(checksum: bool) -> Iterator[Endpoint]:
    """A receiver in a process of its own, until the context ends."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_receive, args=(there, checksum), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(START_SECONDS):
            raise Unavailable(f"the process that receives KV did not listen within {START_SECONDS:.0f} s")
        try:
            address, path = here.recv()
        except EOFError as error:
            raise Unavailable("the process that receives KV ended before it listened") from error
        yield Endpoint(TARGET, address, host_identity(), path, NUM_BLOCKS, LAYOUT)
    finally:
        here.close()
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


def _receive(pipe: Connection, checksum: bool) -> None:
    """Receive until the other end of `pipe` closes."""
    asyncio.run(_serve(pipe, checksum))


async def _serve(pipe: Connection, checksum: bool) -> None:
    memory = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    add_peer_service(server, memory, TARGET, _AcceptsAll(), checksum)
    await server.start()
    pipe.send((f"127.0.0.1:{port}", memory.path))
    await asyncio.to_thread(pipe.poll, None)
    await server.stop(0.5)


class _AcceptsAll:
    """A receiver's bookkeeping that knows no tickets: the way is measured, not the books."""

    def check(self, header: Header) -> None:
        """Every push is welcome."""

    def landed(self, header: Header) -> None:
        """Nobody waits for it."""

    def damaged(self, header: Header, reason: str) -> None:
        raise InternalError(f"KV was damaged on its way within this machine: {reason}")

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        """There is nothing to give up."""
