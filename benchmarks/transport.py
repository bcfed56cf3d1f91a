"""How fast KV moves between two processes of this machine: shared memory and gRPC, beside a plain memory copy.

    python benchmarks/transport.py [--quick]

Pushes of 16 and 64 MiB, checksums on, acknowledged by a receiver in a process of its own, in turn with copies of
the same size within one process (`memcpy_gb_s`), so that a busy machine slows all of them. The figures are
medians. `round_trip_ms` is a push of no bytes: the price of one acknowledgement. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import multiprocessing.connection
import statistics
import time

import grpc
import numpy as np
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, WorkerRef
from baton.kv_transfer.peer import add_peer_service
from baton.kv_transfer.plan import plan_copies
from baton.kv_transfer.pool import PoolMemory
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note, Transport
from baton.kv_transfer.transports import make_transports

LAYOUT = KVLayout(num_layers=12, num_kv_heads=4, head_dim=64, block_size=32, dtype="bfloat16")  # 384 KiB a block
NUM_BLOCKS = 256
SOURCE, TARGET = WorkerRef("prefill-0", 1), WorkerRef("decode-0", 1)
SIZES = (16 << 20, 64 << 20)


class AcceptingSink:
    """Accepts everything: the benchmark measures the way, not the bookkeeping."""

    def check(self, header: Header) -> None: ...

    def landed(self, header: Header) -> None: ...

    def damaged(self, header: Header, reason: str) -> None:
        raise AssertionError(reason)

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None: ...


async def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Receive until the other end of `pipe` closes."""
    memory = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    add_peer_service(server, memory, TARGET, AcceptingSink(), True)
    await server.start()
    pipe.send((f"127.0.0.1:{port}", memory.path))
    await asyncio.to_thread(pipe.poll, None)
    await server.stop(None)


def receiver(pipe: multiprocessing.connection.Connection) -> None:
    asyncio.run(serve(pipe))


async def push_gb_s(transport: Transport, ticket: Ticket, num_blocks: int) -> float:
    """Rate of one push of `num_blocks` blocks, from the call to the acknowledgement."""
    table = tuple(range(num_blocks))
    copies = plan_copies([LAYOUT], [LAYOUT], table, ticket.blocks, num_blocks * LAYOUT.block_size, 0, num_blocks)
    stats = await transport.push(copies, ticket, Note(0, num_blocks))
    return stats.num_bytes / stats.seconds / 1e9


def memcpy_gb_s(target: PoolMemory, source: PoolMemory, num_bytes: int) -> float:
    to, origin = np.frombuffer(target.buffer, np.uint8), np.frombuffer(source.buffer, np.uint8)
    started = time.perf_counter()
    np.copyto(to[:num_bytes], origin[:num_bytes])
    return num_bytes / (time.perf_counter() - started) / 1e9


async def measure(endpoint: Endpoint, rounds: int) -> dict[str, float]:
    memory = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
    other = PoolMemory.shared(NUM_BLOCKS * LAYOUT.block_bytes)
    memory.buffer[:] = np.random.default_rng(0).bytes(memory.num_bytes)
    transports = make_transports(endpoint, memory)
    num_blocks = max(SIZES) // LAYOUT.block_bytes
    blocks = tuple(range(num_blocks))
    ticket = Ticket(Attempt("r", 1), SOURCE, TARGET, blocks, 0, num_blocks * LAYOUT.block_size, 1, 3.0, (endpoint,))
    rates: dict[str, list[float]] = {}
    trips: dict[str, list[float]] = {name: [] for name in transports}
    for name in transports:  # dial, map, fill the page tables
        await push_gb_s(transports[name], ticket, num_blocks)
    for _ in range(rounds):
        for size in SIZES:
            count = size // LAYOUT.block_bytes
            mib = size >> 20
            rates.setdefault(f"memcpy_gb_s_{mib}", []).append(memcpy_gb_s(other, memory, count * LAYOUT.block_bytes))
            for name, transport in transports.items():
                rates.setdefault(f"{name}_gb_s_{mib}", []).append(await push_gb_s(transport, ticket, count))
        for name, transport in transports.items():
            stats = await transport.push([], ticket, Note(0, 0))
            trips[name].append(1e3 * stats.seconds)
    for transport in transports.values():
        await transport.close()
    figures = {key: statistics.median(values) for key, values in rates.items()}
    figures |= {f"{kind}_gb_s": figures[f"{kind}_gb_s_64"] for kind in ("memcpy", *transports)}
    figures |= {f"{name}_round_trip_ms": statistics.median(values) for name, values in trips.items()}
    return {key: round(value, 3) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 20")
    rounds = 5 if parser.parse_args().quick else 20
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=receiver, args=(there,))
    process.start()
    try:
        address, path = here.recv()
        endpoint = Endpoint(TARGET, address, host_identity(), path, NUM_BLOCKS, LAYOUT)
        figures = asyncio.run(measure(endpoint, rounds))
    finally:
        here.send(None)
        process.join(10)
        if process.is_alive():
            process.kill()
    for key, value in sorted(figures.items()):
        print(f"{key:24} {value:10.3f}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
