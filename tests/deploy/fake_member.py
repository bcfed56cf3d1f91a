"""A member of a cluster without a model: it registers with the controller like a worker or a router, and waits.

`fake` in the configuration: `serve` (the default), `exit` (end at once with status 7), `deaf` (ignore SIGTERM).
FAKE_MEMBER=exit in the environment makes every fake member end at once.
"""

from __future__ import annotations

import json
import os
import sys

if os.environ.get("FAKE_MEMBER") == "exit":  # before the imports that take time
    print("a fake member that will not start", file=sys.stderr)
    sys.exit(7)

import asyncio
import secrets
import signal
from contextlib import suppress

import grpc
from baton.proto import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc


class FakeRouter(inference_pb2_grpc.InferenceServicer):
    async def GetServerInfo(self, request, context):  # noqa: N802
        return inference_pb2.GetServerInfoResponse(ready=True)

    async def GetLoad(self, request, context):  # noqa: N802
        worker = inference_pb2.WorkerInfo(worker_id="decode-0", free_blocks=7, total_blocks=9, tickets=1, running=2)
        return inference_pb2.GetLoadResponse(workers=[worker])


def run(config_json: str) -> int:
    config = json.loads(config_json)
    if config.get("fake") == "exit":
        print("a fake member that will not start", file=sys.stderr)
        return 7
    return asyncio.run(serve(config))


async def serve(config: dict) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = (lambda: None) if config.get("fake") == "deaf" else stop.set
        asyncio.get_running_loop().add_signal_handler(number, handler)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(FakeRouter(), server)
    is_router = "router_id" in config
    wanted = config["topology"]["router"]["grpc"].rpartition(":")[2] if is_router else "0"
    port = server.add_insecure_port(f"127.0.0.1:{wanted}")
    await server.start()
    registration = worker_pb2.Registration(
        worker=worker_pb2.WorkerId(worker_id=config.get("router_id") or config["worker_id"], epoch=secrets.randbits(48)),
        role="router" if is_router else config["pool"]["role"],
        address=f"127.0.0.1:{port}",
        http_address=f"127.0.0.1:{port}" if is_router else "",
        pid=os.getpid(),
    )
    registering = asyncio.create_task(register(config["controller"], registration))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([registering, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    registering.cancel()
    await server.stop(0)
    return 0 if stop.is_set() else 3


async def register(controller: str, registration: worker_pb2.Registration) -> None:
    """Returns when the controller refuses us."""
    while True:
        with suppress(grpc.aio.AioRpcError):
            async with grpc.aio.insecure_channel(controller) as channel:
                async for reply in worker_pb2_grpc.ControllerStub(channel).Register(registration):
                    if not reply.accepted:
                        return
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1]))
