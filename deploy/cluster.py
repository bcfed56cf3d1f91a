"""Bringing a cluster up in this process and taking it down again, on either launcher.

`running_cluster` is what `baton up`, the demo and the tests share. Whatever happens inside it, nothing is left behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import grpc

from ..core.errors import Unavailable
from ..core.topology import Topology
from ..proto import inference_pb2 as inference
from ..proto import inference_pb2_grpc as inference_rpc
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .controller import Controller
from .controller_server import serving
from .members import member_specs
from .ports import free_port, shared_router_ports
from .settings import prepare_ray_environment
from .state import ledger_path, log_folder
from .subprocess_launcher import SubprocessLauncher
from .supervisor import Backoff, MemberState

_LOOK = 0.2  # seconds between looks at a cluster that is starting
_CALL = 5.0  # seconds that a controller or router may take to answer
_AWAY = 60.0  # seconds that a controller may be away (Ray restarts it in 2) before we call the cluster lost

logger = logging.getLogger("baton.cluster")


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """What is to be seen of a cluster from outside.

    grpc, http   where clients find the router, or any of several; "" until one has registered
    waiting_for  "" when the cluster is ready, else what is missing
    """

    members: tuple[pb.Member, ...]
    grpc: str = ""
    http: str = ""
    waiting_for: str = ""
    uptime: float = 0.0

    @property
    def ready(self) -> bool:
        return not self.waiting_for

    @property
    def failed(self) -> tuple[pb.Member, ...]:
        """Members that the controller has given up."""
        return tuple(member for member in self.members if member.state == MemberState.FAILED)


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster whose controller answers at `controller` (host:port)."""

    name: str
    controller: str
    logs: Path

    async def status(self) -> ClusterStatus:
        """Raises Unavailable when the controller does not answer."""
        return await cluster_status(self.controller)

    async def wait_ready(self, on_change: Callable[[ClusterStatus], None] = lambda _: None) -> ClusterStatus:
        """Wait until every member is ready and every router serves. `on_change` sees each new status.

        Raises Unavailable when a member has failed for good, with the end of its log.
        """
        seen: ClusterStatus | None = None
        while True:
            status = await self.status()
            if seen is None or (status.members, status.waiting_for) != (seen.members, seen.waiting_for):
                on_change(status)
                seen = status
            if status.ready:
                return status
            if status.failed:
                raise Unavailable("\n".join(_obituary(member, self.logs) for member in status.failed))
            await asyncio.sleep(_LOOK)

    async def ended(self) -> None:
        """Wait until somebody shuts the cluster down. Raises Unavailable when its controller is lost."""
        loop = asyncio.get_running_loop()
        last_seen = loop.time()
        async with grpc.aio.insecure_channel(self.controller) as channel:
            while True:
                try:
                    async for _ in rpc.ControllerStub(channel).Watch(pb.WatchRequest(router_id="")):
                        last_seen = loop.time()
                    return
                except grpc.aio.AioRpcError as error:
                    if loop.time() - last_seen > _AWAY:
                        raise Unavailable(f"the controller at {self.controller} is gone: {error.details()}") from error
                await asyncio.sleep(1.0)


@asynccontextmanager
async def running_cluster(
    topology: Topology, logs: Path | None = None, backoff: Backoff = Backoff()
) -> AsyncIterator[RunningCluster]:
    """Start `topology` on its launcher (a local Ray for `ray`) and end all of it on leaving.

    Must be entered in the main thread: Ray's processes live as long as the thread that starts them. Members are
    starting when this yields; see `wait_ready`. Raises Unavailable when nothing can be started.
    """
    logs = logs or log_folder(topology.cluster)
    keep_old_logs(logs)
    if topology.launcher == "ray":
        hosting = _ray_host().local_ray_cluster(topology, logs, backoff)
    else:
        hosting = _subprocess_cluster(topology, logs, backoff)
    async with hosting as controller:
        yield RunningCluster(topology.cluster, controller, logs)


@asynccontextmanager
async def running_on_ray(topology: Topology, ray_address: str) -> AsyncIterator[tuple[RunningCluster, asyncio.Event]]:
    """Start `topology` on the running Ray at `ray_address`; end it on leaving, unless the event has been set: then it
    lives on there. Ray itself is left as it was. Raises Unavailable when nothing can be started.
    """
    ray_host = _ray_host()
    logs = log_folder(topology.cluster)
    ray_host.connect(ray_address)
    try:
        with shared_router_ports(topology, elsewhere=True) as settled:
            controller, _ = await ray_host.start_on_ray(settled, logs, Backoff())
            leave = asyncio.Event()
            try:
                yield RunningCluster(topology.cluster, controller, logs), leave
            finally:
                if not leave.is_set():
                    await ray_host.stop_on_ray(topology.cluster, controller)
    finally:
        ray_host.disconnect()


async def end_on_ray(cluster: str, ray_address: str, controller: str) -> list[str]:
    """End what `running_on_ray` left on a running Ray; returns the names of the actors that had to be killed."""
    ray_host = _ray_host()
    ray_host.connect(ray_address)
    try:
        killed: list[str] = await ray_host.stop_on_ray(cluster, controller)
        return killed
    finally:
        ray_host.disconnect()


async def cluster_status(controller: str) -> ClusterStatus:
    """Ask the controller, and every router whether it serves. Raises Unavailable when the controller does not answer."""
    try:
        async with grpc.aio.insecure_channel(controller) as channel:
            state: pb.ClusterState = await rpc.ControllerStub(channel).GetCluster(pb.GetClusterRequest(), timeout=_CALL)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"the controller at {controller} does not answer: {error.details()}") from error
    members = tuple(state.members)
    routers = [m.registration for m in members if m.registration.role == "router" and m.state == MemberState.READY]
    if not routers:
        return ClusterStatus(members, waiting_for=_not_ready(members) or "router", uptime=state.uptime)
    waiting_for = _not_ready(members) or await _routers_wait_for(routers)
    grpc_address = routers[0].shared_address or routers[0].address
    http_address = routers[0].shared_http_address or routers[0].http_address
    return ClusterStatus(members, grpc_address, http_address, waiting_for, state.uptime)


async def router_load(address: str) -> inference.GetLoadResponse:
    """The router's view of its workers. Raises Unavailable when it does not answer."""
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            load: inference.GetLoadResponse = await inference_rpc.InferenceStub(channel).GetLoad(
                inference.GetLoadRequest(), timeout=_CALL
            )
            return load
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"the router at {address} does not answer: {error.details()}") from error


async def request_shutdown(controller: str) -> None:
    """Ask a controller to end its cluster and wait until it has. Raises Unavailable when it does not answer."""
    try:
        async with grpc.aio.insecure_channel(controller) as channel:
            await rpc.ControllerStub(channel).Shutdown(pb.ShutdownRequest(), timeout=4 * _CALL)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"the controller at {controller} does not answer: {error.details()}") from error


def keep_old_logs(logs: Path) -> None:
    """Set the logs of the last run aside as `*.log.old`."""
    for log in logs.glob("*.log"):
        if log.name != "up.log":  # our own, of a run in the background
            log.replace(log.with_name(log.name + ".old"))


def _ray_host() -> ModuleType:
    """Ray is imported only here and only when asked for, so that the rest works on machines without it."""
    prepare_ray_environment()
    try:
        from . import ray_host
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise Unavailable("Ray is not installed: `pip install ray`, or use launcher: subprocess") from error
    return ray_host


@asynccontextmanager
async def _subprocess_cluster(topology: Topology, logs: Path, backoff: Backoff) -> AsyncIterator[str]:
    launcher = SubprocessLauncher(ledger_path(topology.cluster))
    for orphan in await launcher.end_orphans():
        logger.warning("ended %s, left over from an earlier run of cluster %s", orphan, topology.cluster)
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    try:
        with shared_router_ports(topology) as settled:
            controller = Controller(topology.cluster, member_specs(settled, address, logs), launcher, backoff)
            async with serving(controller, address) as bound:
                yield bound
    finally:
        await launcher.close()


async def _routers_wait_for(routers: Sequence[pb.Registration]) -> str:
    """Why not every router serves yet, "" when all do."""
    reasons = await asyncio.gather(*(_router_waits_for(router.address) for router in routers))
    if len(routers) == 1:
        return reasons[0]
    named = zip((router.worker.worker_id for router in routers), reasons, strict=True)
    return "; ".join(f"{name}: {reason}" for name, reason in named if reason)


async def _router_waits_for(address: str) -> str:
    """Why the router does not serve yet, "" when it does."""
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_rpc.InferenceStub(channel)
            info: inference.GetServerInfoResponse = await stub.GetServerInfo(inference.GetServerInfoRequest(), timeout=_CALL)
    except grpc.aio.AioRpcError as error:
        return f"router does not answer: {error.details()}"
    return "" if info.ready else info.not_ready_reason or "router"


def _not_ready(members: tuple[pb.Member, ...]) -> str:
    return ", ".join(m.registration.worker.worker_id for m in members if m.state != MemberState.READY)


def _obituary(member: pb.Member, logs: Path) -> str:
    name = member.registration.worker.worker_id
    return f"{name} has failed to start {member.restarts + 1} times: {member.last_error}\nits log: {logs / name}.log"
