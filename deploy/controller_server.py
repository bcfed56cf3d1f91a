"""The controller's gRPC face."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from ..core.errors import Unavailable
from ..core.request import WorkerRef
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .controller import Controller

_OPTIONS = (("grpc.so_reuseport", 0),)  # a second controller on the port must fail, not share it


class ControllerService(rpc.ControllerServicer):
    """Answers members, routers and the command line."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def Register(  # noqa: N802 (the names are the service's)
        self, request: pb.Registration, context: grpc.aio.ServicerContext[pb.Registration, pb.Registered]
    ) -> AsyncIterator[pb.Registered]:
        reason = self._controller.register(request)
        yield pb.Registered(accepted=not reason, reason=reason)
        if not reason:
            await self._controller.stopped()  # the open stream tells the member that its controller lives

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[pb.WatchRequest, pb.Roster]
    ) -> AsyncIterator[pb.Roster]:
        async for roster in self._controller.rosters():
            yield roster

    async def Kill(  # noqa: N802
        self, request: pb.KillRequest, context: grpc.aio.ServicerContext[pb.KillRequest, pb.KillReply]
    ) -> pb.KillReply:
        ref = WorkerRef(request.worker.worker_id, request.worker.epoch)
        # Shielded: a router that stops waiting must not leave a half-done kill behind.
        return pb.KillReply(dead=await asyncio.shield(self._controller.kill(ref, request.reason)))

    async def GetCluster(  # noqa: N802
        self, request: pb.GetClusterRequest, context: grpc.aio.ServicerContext[pb.GetClusterRequest, pb.ClusterState]
    ) -> pb.ClusterState:
        return self._controller.state()

    async def Shutdown(  # noqa: N802
        self, request: pb.ShutdownRequest, context: grpc.aio.ServicerContext[pb.ShutdownRequest, pb.ShutdownReply]
    ) -> pb.ShutdownReply:
        await asyncio.shield(self._controller.shutdown())
        return pb.ShutdownReply()


@asynccontextmanager
async def serving(controller: Controller, address: str) -> AsyncIterator[str]:
    """Serve `controller` at `address` (host:port, port 0 for any free one); yields the address it has.

    On leaving, every member is ended. Raises Unavailable when the port is taken.
    """
    server = grpc.aio.server(options=_OPTIONS)
    rpc.add_ControllerServicer_to_server(ControllerService(controller), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise Unavailable(f"the controller cannot listen on {address}: {error}") from error
    await controller.attach()
    await server.start()
    controller.start()
    try:
        yield f"{address.rpartition(':')[0]}:{port}"
    finally:
        await controller.shutdown()
        await server.stop(0.5)
