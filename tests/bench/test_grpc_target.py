"""The gRPC target against a scripted Inference service on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from baton.bench.driver import run_load
from baton.bench.grpc_target import GrpcTarget, ServedModel, ask_model
from baton.bench.prompts import PromptSource
from baton.core.errors import Unavailable
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as rpc
from baton.simulator.workload.planned import PlannedRequest


@dataclass
class FakeInference(rpc.InferenceServicer):
    """Answers with chunks of the sizes in `chunks`; a single 0 sheds; None hangs until the client goes away."""

    chunks: tuple[int, ...] | None = (1, 1, 3)
    finish_reason: str = "length"
    address: str = ""
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def Generate(  # noqa: N802 (the name in the protocol)
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.begun.set()
        if self.chunks is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.gone.set()
        if self.chunks == (0,):
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        for size in self.chunks or ():
            yield pb.GenerateResponse(token_ids=[5] * size, text="x")
        yield pb.GenerateResponse(finish_reason=self.finish_reason, usage=pb.Usage(prompt_tokens=9, completion_tokens=5))

    async def GetModel(self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext) -> pb.GetModelResponse:  # noqa: N802
        return pb.GetModelResponse(name="tiny", max_model_len=256, vocab_size=300)

    async def GetLoad(self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext) -> pb.GetLoadResponse:  # noqa: N802
        return pb.GetLoadResponse(workers=[pb.WorkerInfo(role="prefill"), pb.WorkerInfo(role="decode")])


@pytest.fixture
async def baton() -> AsyncIterator[FakeInference]:
    service = FakeInference()
    server = grpc.aio.server()
    rpc.add_InferenceServicer_to_server(service, server)
    service.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield service
    await server.stop(0)


async def test_token_counts_are_exact_and_the_request_is_complete(baton: FakeInference) -> None:
    target = GrpcTarget(baton.address, "tiny", PromptSource(0))
    result = await run_load(target, [PlannedRequest(0, 0.0, 9, 5), PlannedRequest(1, 0.0, 3, 5, prompt="def f():")])
    await target.close()
    record = result.records[0]
    assert record.ok
    assert (record.num_tokens, record.chunk_tokens, record.prompt_tokens, record.finish_reason) == (5, (1, 1, 3), 9, "length")
    ids, text = sorted(baton.requests, key=lambda request: request.HasField("text"))
    assert list(ids.tokens.ids) == PromptSource(0).token_ids(PlannedRequest(0, 0.0, 9, 5))
    assert (ids.sampling.max_tokens, ids.sampling.min_tokens, ids.sampling.ignore_eos) == (5, 5, True)
    assert ids.sampling.temperature == 0.0
    assert ids.sampling.HasField("temperature")
    assert text.text == "def f():"


async def test_a_shed_request_is_a_failure_with_its_code(baton: FakeInference) -> None:
    baton.chunks = (0,)
    target = GrpcTarget(baton.address, "tiny", PromptSource(0))
    record = (await run_load(target, [PlannedRequest(0, 0.0, 9, 5)])).records[0]
    await target.close()
    assert (record.error, record.message) == ("grpc RESOURCE_EXHAUSTED", "the queue is full")


async def test_an_aborted_stream_is_no_success(baton: FakeInference) -> None:
    baton.finish_reason = "abort"
    target = GrpcTarget(baton.address, "tiny", PromptSource(0))
    record = (await run_load(target, [PlannedRequest(0, 0.0, 9, 5)])).records[0]
    await target.close()
    assert record.error == "cut short"


async def test_stopping_a_run_cancels_at_the_server(baton: FakeInference) -> None:
    baton.chunks = None
    target = GrpcTarget(baton.address, "tiny", PromptSource(0))
    stop = asyncio.Event()
    running = asyncio.create_task(run_load(target, [PlannedRequest(0, 0.0, 9, 5)], stop=stop))
    await asyncio.wait_for(baton.begun.wait(), 5)
    stop.set()
    result = await asyncio.wait_for(running, 5)
    await asyncio.wait_for(baton.gone.wait(), 5)
    await target.close()
    assert (result.interrupted, result.records[0].error, result.records[0].end) == (True, "unfinished", None)


async def test_the_router_is_asked_for_its_model_and_workers(baton: FakeInference, unused_tcp_port: int) -> None:
    assert await ask_model(baton.address) == ServedModel("tiny", 256, 300, 2)
    with pytest.raises(Unavailable, match=f"127.0.0.1:{unused_tcp_port}"):
        await ask_model(f"127.0.0.1:{unused_tcp_port}")
