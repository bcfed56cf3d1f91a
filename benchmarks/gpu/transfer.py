"""A handoff between two processes on one GPU: the KV of a prompt of 4,096 tokens, from the sender's pool into the receiver's.

    python benchmarks/gpu/transfer.py [--transport cuda_ipc] [--quick]
    python benchmarks/gpu/transfer.py --device cpu     # no GPU: proves the script on a small pool over the staged grpc transport

Shape of Llama-3.1-8B: 128 KiB a token, 512 MiB in blocks of 16 tokens that are scattered at both ends; checksums on. The
receiver idles. Bytes that arrive are compared first.

whole_ms           one push of everything, to the acknowledgement; gb_s is its rate
exposed_ms         as a chunked prefill pushes it: the first half went while the second was computed, this is what is left
staged_gb_s        the same bytes through pinned memory and grpc, for pools that cannot reach each other

The last line is JSON. Without a GPU the script says so and ends with status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace

import grpc
import torch
from baton.core.kv import Endpoint, KVLayout
from baton.core.request import Attempt, WorkerRef
from baton.kernels.device import CudaDevice, Device, HostDevice
from baton.kv_transfer.cuda_ipc import CudaMappings
from baton.kv_transfer.device_pool import DevicePool
from baton.kv_transfer.peer import add_peer_service
from baton.kv_transfer.plan import plan_copies
from baton.kv_transfer.registry import host_identity
from baton.kv_transfer.ticket import Ticket
from baton.kv_transfer.transport import Header, Note, Transport
from baton.kv_transfer.transports import make_transports

SOURCE, TARGET = WorkerRef("source", 1), WorkerRef("target", 1)
ROUNDS = 7


@dataclass(frozen=True)
class Sizes:
    """The pool's layout, its blocks, and those that are handed over."""

    layout: KVLayout
    num_blocks: int
    num_moved: int


FULL = Sizes(KVLayout(32, 8, 128, 16, "bfloat16"), 1024, 256)
TINY = Sizes(KVLayout(2, 2, 16, 16, "float32"), 64, 16)


class AcceptingSink:
    """A receiver that takes whatever comes."""

    def check(self, header: Header) -> None: ...

    def landed(self, header: Header) -> None: ...

    def damaged(self, header: Header, reason: str) -> None: ...

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="cuda_ipc", choices=("cuda_ipc", "grpc"))
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--receive", action="store_true", help="for itself: be the second process")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu proves the script", file=sys.stderr)
        return 2
    device: Device = HostDevice() if on_cpu else CudaDevice(0, 0.45)
    sizes = TINY if on_cpu else FULL
    if options.receive:
        asyncio.run(receive(device, sizes))
        return 0
    command = [sys.executable, __file__, "--receive", "--device", options.device]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            name = "grpc" if on_cpu else options.transport
            rounds = 2 if options.quick or on_cpu else ROUNDS
            figures = asyncio.run(measure(device, sizes, child, name, rounds))
        finally:
            child.kill()
    print(json.dumps({"device": device.name, "transport": name} | figures))
    return 0


def make_pool(device: Device, sizes: Sizes, seed: int) -> DevicePool:
    num_bytes = sizes.num_blocks * sizes.layout.block_bytes
    flat = torch.empty(num_bytes, dtype=torch.uint8, device=device.torch_device)
    flat.random_(0, 256, generator=torch.Generator(device.torch_device).manual_seed(seed))
    return DevicePool(flat, sizes.layout.block_bytes, device)


def endpoint_of(ref: WorkerRef, address: str, pool: DevicePool, sizes: Sizes) -> Endpoint:
    handle = CudaMappings.export(pool.flat) if pool.device.torch_device.type == "cuda" else b""
    return Endpoint(ref, address, host_identity(), "", sizes.num_blocks, sizes.layout, handle)


async def receive(device: Device, sizes: Sizes) -> None:
    """The second process: says where it is reached, and the digest of what it is asked for, a line of block ids at a time."""
    pool = make_pool(device, sizes, seed=2)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    add_peer_service(server, pool, TARGET, AcceptingSink())
    await server.start()
    endpoint = endpoint_of(TARGET, f"127.0.0.1:{port}", pool, sizes)
    print(json.dumps({"address": endpoint.address, "handle": endpoint.handle.hex()}), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(pool.digest(runs_of_blocks(json.loads(line), sizes)), flush=True)


def runs_of_blocks(blocks: list[int], sizes: Sizes) -> tuple[tuple[int, int], ...]:
    return tuple((block * sizes.layout.block_bytes, sizes.layout.block_bytes) for block in blocks)


async def measure(device: Device, sizes: Sizes, child: subprocess.Popen[str], name: str, rounds: int) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    said = json.loads(await asyncio.to_thread(child.stdout.readline))
    pool = make_pool(device, sizes, seed=1)
    own = endpoint_of(SOURCE, "127.0.0.1:1", pool, sizes)
    target = replace(own, worker=TARGET, address=said["address"], handle=bytes.fromhex(said["handle"]))
    transports = make_transports(own, pool)
    draw = random.Random(0)
    whole, exposed, staged = [], [], []
    for number in range(rounds + 1):
        mine, theirs = (draw.sample(range(sizes.num_blocks), sizes.num_moved) for _ in range(2))
        seconds = await push(transports[name], sizes, target, mine, theirs, f"w{number}", (sizes.num_moved,))
        child.stdin.write(json.dumps(theirs) + "\n")
        child.stdin.flush()
        arrived = int(await asyncio.to_thread(child.stdout.readline))
        if arrived != pool.digest(runs_of_blocks(mine, sizes)):
            raise SystemExit("the bytes that arrived are not those that were sent")
        halves = (sizes.num_moved // 2, sizes.num_moved - sizes.num_moved // 2)
        last = await push(transports[name], sizes, target, mine, theirs, f"h{number}", halves)
        slow = await push(transports["grpc"], sizes, target, mine, theirs, f"s{number}", (sizes.num_moved,))
        if number:  # the first dials and opens
            whole.append(seconds)
            exposed.append(last)
            staged.append(slow)
    for transport in transports.values():
        await transport.close()
    num_bytes = sizes.num_moved * sizes.layout.block_bytes
    median = statistics.median
    return {
        "mib": num_bytes / (1 << 20),
        "whole_ms": round(1e3 * median(whole), 3),
        "gb_s": round(num_bytes / median(whole) / 1e9, 2),
        "exposed_ms": round(1e3 * median(exposed), 3),
        "staged_gb_s": round(num_bytes / median(staged) / 1e9, 2),
    }


async def push(
    transport: Transport, sizes: Sizes, to: Endpoint, mine: list[int], theirs: list[int], name: str, portions: tuple[int, ...]
) -> float:
    """Push the blocks in portions; the seconds of the last one."""
    num_tokens = len(mine) * sizes.layout.block_size
    ticket = Ticket(Attempt(name, 1), SOURCE, TARGET, tuple(theirs), 0, num_tokens, 1, 3.0, (to,))
    first, seconds = 0, 0.0
    for portion in portions:
        note = Note(first, portion, last=first + portion == len(mine), first_token=1)
        copies = plan_copies([sizes.layout], [sizes.layout], mine, theirs, num_tokens, first, portion)
        seconds = (await transport.push(copies, ticket, note)).seconds
        first += portion
    return seconds


if __name__ == "__main__":
    sys.exit(main())
