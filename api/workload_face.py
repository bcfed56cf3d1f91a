"""The router's face towards whoever plans: what was asked of it lately, and the topology that it serves."""

from __future__ import annotations

import grpc

from ..core.clock import Clock
from ..proto import worker_pb2 as pb
from ..proto import worker_pb2_grpc as rpc
from ..router.recent import RecentRequests


class WorkloadFace(rpc.RouterServicer):
    """`topology` is the YAML that the cluster was started from."""

    def __init__(self, recent: RecentRequests, topology: str, clock: Clock) -> None:
        self._recent = recent
        self._topology = topology
        self._clock = clock

    async def GetWorkload(  # noqa: N802 (the name is the service's)
        self, request: pb.WorkloadRequest, context: grpc.aio.ServicerContext[pb.WorkloadRequest, pb.ObservedWorkload]
    ) -> pb.ObservedWorkload:
        now = self._clock.now()
        return pb.ObservedWorkload(
            topology=self._topology,
            requests=[
                pb.ObservedRequest(
                    age=now - each.arrival,
                    input_tokens=each.input_tokens,
                    output_tokens=each.output_tokens,
                    cached_tokens=each.cached_tokens,
                    ok=each.ok,
                    ttft=each.ttft,
                    tpot=each.tpot,
                )
                for each in self._recent.requests()
            ],
        )
