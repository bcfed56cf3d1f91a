"""A cluster of real processes, sockets and shared memory with the model that ships, and what tests do to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from baton.client.client import AsyncClient
from baton.core.slo import Slo
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.cluster import ClusterStatus, RunningCluster, router_load, running_cluster
from baton.proto import inference_pb2 as pb

MODEL = Path(__file__).resolve().parents[2] / "examples" / "model" / "pydoc-llama"
PROMPT = "Return a list of the names of the entries in the directory"


def topology(name: str, *, pools: tuple[PoolSpec, ...] | None = None, launcher: str = "subprocess", **router: object) -> Topology:
    """One prefill and one decode worker, fp32, decoding slowly enough to be interrupted."""
    small = {"kv_memory_bytes": 24 << 20, "block_size": 16, "max_num_seqs": 32}
    return Topology(
        cluster=name,
        model=ModelSpec(str(MODEL), dtype="float32", name="pydoc"),
        pools=pools
        or (
            PoolSpec(Role.PREFILL, **small),  # type: ignore[arg-type]
            PoolSpec(Role.DECODE, step_delay=0.02, **small),  # type: ignore[arg-type]
        ),
        slo=Slo(1.0, 0.1, 0.9),
        kv_transfer=KvTransferSpec(),
        router=replace(RouterSpec(grpc="127.0.0.1:0", http="127.0.0.1:0"), **router),  # type: ignore[arg-type]
        launcher=launcher,
    )


@dataclass
class LiveCluster:
    """A running cluster and what a test does to it."""

    running: RunningCluster
    grpc: str
    http: str
    client: AsyncClient
    struck: dict[str, int] = field(default_factory=dict)  # the pid that each killed member had

    async def status(self) -> ClusterStatus:
        return await self.running.status()

    async def pid(self, member_id: str) -> int:
        """Process id of a member that is ready."""
        for member in (await self.status()).members:
            if member.registration.worker.worker_id == member_id and member.registration.pid:  # a signal to 0 would be for us
                return member.registration.pid
        raise AssertionError(f"no member {member_id} is ready")

    async def strike(self, member_id: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a member's process; return its pid."""
        pid = await self.pid(member_id)
        os.kill(pid, number)
        if number == signal.SIGKILL:
            self.struck[member_id] = pid
        return pid

    async def load(self) -> dict[str, pb.WorkerInfo]:
        return {worker.worker_id: worker for worker in (await router_load(self.grpc)).workers}

    async def ready(self, seconds: float = 40.0) -> None:
        """Every member is up (again), those that were killed in another process, and the router serves."""
        async with asyncio.timeout(seconds):
            while True:
                members = (await self.running.wait_ready()).members
                pids = {member.registration.worker.worker_id: member.registration.pid for member in members}
                if all(pids.get(member_id) != pid for member_id, pid in self.struck.items()):
                    return
                await asyncio.sleep(0.05)  # the controller has not noticed yet

    async def baseline(self, seconds: float = 5.0, members: int = 2) -> None:
        """Every block free, no ticket, nothing running, at all of the workers."""
        await self.until_load(lambda load: len(load) == members and all(at_rest(w) for w in load.values()), seconds)

    async def until_load(self, holds: Callable[[dict[str, pb.WorkerInfo]], bool], seconds: float) -> None:
        load: dict[str, pb.WorkerInfo] = {}
        try:
            async with asyncio.timeout(seconds):
                while not holds(load := await self.load()):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {load}") from None


def at_rest(worker: pb.WorkerInfo) -> bool:
    idle = worker.assigned == worker.waiting == worker.running == worker.tickets == worker.quarantined_blocks == 0
    return idle and worker.free_blocks == worker.total_blocks > 0


@asynccontextmanager
async def live(asked: Topology, logs: Path) -> AsyncIterator[LiveCluster]:
    async with running_cluster(asked, logs) as running:
        async with asyncio.timeout(90):
            status = await running.wait_ready()
        async with AsyncClient(status.grpc) as client:
            yield LiveCluster(running, status.grpc, status.http, client)
