"""A load target that keeps the stage times which Baton reports with the last message of every sequence."""

from __future__ import annotations

from baton.bench.driver import Exchange
from baton.bench.grpc_target import GrpcTarget
from baton.proto import inference_pb2 as pb


class StageTarget(GrpcTarget):
    """As GrpcTarget; `stages` grows by one per finished sequence."""

    stages: list[pb.StageTimes]
