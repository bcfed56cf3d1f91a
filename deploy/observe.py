"""What a running cluster remembers of its work, asked of every router and worker: `baton plan --from-live` plans with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..core.errors import Unavailable
from ..core.observed import ObservedRequest, ObservedStep
from ..core.shape import StepShape
from ..core.topology import Topology
from ..core.view import Role
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from .settings import parse_topology
from .supervisor import MemberState

_CALL = 10.0  # seconds that a member may take to answer


@dataclass(frozen=True, slots=True)
class WorkerSteps:
    """A sample of the steps of one worker."""

    worker: str
    role: Role
    steps: tuple[ObservedStep, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """requests are those of all routers, their `arrival` in seconds before the moment of asking (so it is negative)."""

    topology: Topology
    requests: tuple[ObservedRequest, ...]
    workers: tuple[WorkerSteps, ...]


async def observe(controller: str) -> Observation:
    """Ask everybody who is ready. Raises Unavailable when the controller, every router or a worker does not answer."""
    try:
        async with grpc.aio.insecure_channel(controller) as channel:
            state: pb.ClusterState = await rpc.ControllerStub(channel).GetCluster(pb.GetClusterRequest(), timeout=_CALL)
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"the controller at {controller} does not answer: {error.details()}") from error
    ready = [member.registration for member in state.members if member.state == MemberState.READY]
    routers = [member for member in ready if member.role == "router"]
    if not routers:
        raise Unavailable(f"no router of cluster {state.cluster} is ready: nobody knows what was asked of it")
    workloads = await asyncio.gather(*map(_workload, routers))
    workers = await asyncio.gather(*(_steps(member) for member in ready if member.role != "router"))
    topology = parse_topology(workloads[0].topology, f"the topology of {state.cluster}", Path("/")).topology
    requests = tuple(_request(each) for workload in workloads for each in workload.requests)
    return Observation(topology, requests, tuple(workers))


async def _workload(router: pb.Registration) -> pb.ObservedWorkload:
    try:
        async with grpc.aio.insecure_channel(router.address) as channel:
            found: pb.ObservedWorkload = await rpc.RouterStub(channel).GetWorkload(pb.WorkloadRequest(), timeout=_CALL)
            return found
    except grpc.aio.AioRpcError as error:
        raise _silent(router, error) from error


async def _steps(worker: pb.Registration) -> WorkerSteps:
    try:
        async with grpc.aio.insecure_channel(worker.address) as channel:
            found: pb.ObservedSteps = await rpc.WorkerStub(channel).GetSteps(pb.StepsRequest(), timeout=_CALL)
    except grpc.aio.AioRpcError as error:
        raise _silent(worker, error) from error
    return WorkerSteps(worker.worker.worker_id, Role(worker.role), _observed(found.steps))


def _silent(member: pb.Registration, error: grpc.aio.AioRpcError) -> Unavailable:
    return Unavailable(f"{member.worker.worker_id} at {member.address} does not say what it has done: {error.details()}")


def _request(message: pb.ObservedRequest) -> ObservedRequest:
    return ObservedRequest(
        -message.age,
        message.input_tokens,
        message.output_tokens,
        message.cached_tokens,
        message.ok,
        message.ttft if message.HasField("ttft") else None,
        message.tpot if message.HasField("tpot") else None,
    )


def _observed(messages: Sequence[pb.ObservedStep]) -> tuple[ObservedStep, ...]:
    return tuple(
        ObservedStep(
            StepShape(
                each.prefill_rows,
                each.prefill_tokens,
                each.prefill_pairs,
                each.prefill_context,
                each.decode_rows,
                each.decode_context,
                each.sampled,
            ),
            each.seconds,
            each.period,
        )
        for each in messages
    )
