"""A receiving worker in a process of its own, for tests that stop or kill it.

Arguments: worker id, epoch, number of blocks, bytes per block, and "host" or "device" for what its pool is taken for. Prints
one JSON line when it listens. Accepts every push of generation 1 and prints "landed" for each.
"""

from __future__ import annotations

import asyncio
import json
import sys

import grpc
import torch
from baton.core.errors import TransferRefused
from baton.core.request import Attempt, WorkerRef
from baton.kernels.device import HostDevice
from baton.kv_transfer.device_pool import DevicePool
from baton.kv_transfer.peer import add_peer_service
from baton.kv_transfer.pool import KvMemory, PoolMemory
from baton.kv_transfer.transport import Header


class AcceptingSink:
    """Takes whatever is of generation 1."""

    def check(self, header: Header) -> None:
        if header.generation != 1:
            raise TransferRefused("only generation 1 lives")

    def landed(self, header: Header) -> None:
        self.check(header)
        print("landed", flush=True)

    def damaged(self, header: Header, reason: str) -> None:
        print("damaged", flush=True)

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        print("stopped", flush=True)


async def main(worker_id: str, epoch: int, num_blocks: int, block_bytes: int, on_device: bool) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    port = server.add_insecure_port("127.0.0.1:0")
    memory = PoolMemory.shared(num_blocks * block_bytes)
    taken: KvMemory = memory
    if on_device:
        taken = DevicePool(torch.frombuffer(memory.buffer, dtype=torch.uint8), block_bytes, HostDevice())
    add_peer_service(server, taken, WorkerRef(worker_id, epoch), AcceptingSink(), True)
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}", "path": memory.path}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5] == "device"))
