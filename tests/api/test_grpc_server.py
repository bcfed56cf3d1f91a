"""The gRPC face with raw stubs: streams, errors, deadlines, health and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
from baton.core.topology import RouterSpec
from baton.core.view import Role
from baton.proto import inference_pb2 as pb
from baton.proto import inference_pb2_grpc as rpc
from baton.tests.router.fake_cluster import LOGPROBS
from baton.tests.router.router_process import Router, running_router, tokenizer, until_health
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

TEXT = "class Wörld: pass and then some"


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with running_router(text=TEXT) as running:
        yield running


@pytest.fixture
async def stub(router: Router) -> AsyncIterator[rpc.InferenceStub]:
    async with grpc.aio.insecure_channel(router.grpc) as channel:
        yield rpc.InferenceStub(channel)


async def generate(
    stub: rpc.InferenceStub, request: pb.GenerateRequest, timeout: float | None = None
) -> list[pb.GenerateResponse]:
    return [message async for message in stub.Generate(request, timeout=timeout)]


async def test_generate_streams_text_tokens_and_a_summary(stub: rpc.InferenceStub) -> None:
    request = pb.GenerateRequest(text="Hello", request_id="mine", sampling=pb.Sampling(temperature=0.0, logprobs=1))
    messages = await generate(stub, request)
    tokens = [token for message in messages for token in message.token_ids]
    assert "".join(message.text for message in messages) == TEXT
    assert tokens == [*await tokenizer().encode(TEXT, False), 1]
    assert all(message.request_id == "mine" for message in messages)
    assert [message.finish_reason for message in messages[:-1]] == [""] * (len(messages) - 1)
    last = messages[-1]
    assert last.finish_reason == "stop"
    assert last.usage.completion_tokens == len(tokens)
    assert last.usage.cached_tokens == 3
    stages = last.stages
    assert stages.attempts == 1
    assert stages.prefill > 0
    assert stages.queue + stages.prefill + stages.handoff + stages.first_decode <= stages.total
    logprobs = [entry for message in messages for entry in message.logprobs]
    assert [entry.token for entry in logprobs] == tokens


async def test_every_kind_of_prompt(router: Router, stub: rpc.InferenceStub) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hi")])
    requests = [
        pb.GenerateRequest(text="Hi", sampling=pb.Sampling(max_tokens=1)),
        pb.GenerateRequest(tokens=pb.TokenIds(ids=[9, 8]), sampling=pb.Sampling(max_tokens=1)),
        pb.GenerateRequest(chat=chat, sampling=pb.Sampling(max_tokens=1)),
    ]
    for request in requests:
        assert (await generate(stub, request))[-1].finish_reason == "length"
    prompts = [tuple(m.submit.sequence.prompt) for m in router.cluster.workers["p0"].received if m.HasField("submit")][-3:]
    assert prompts[0] == await tokenizer().encode("Hi")
    assert prompts[1] == (9, 8)
    assert prompts[2] == await tokenizer().encode("<|bos|><|user|>Hi<|end|><|assistant|>", False)


async def test_the_best_of_several_comes_whole(stub: rpc.InferenceStub) -> None:
    request = pb.GenerateRequest(text="a", n=2, best_of=4, sampling=pb.Sampling(logprobs=0, prompt_logprobs=1))
    messages = await generate(stub, request)
    assert [message.index for message in messages] == [0, 1]
    assert all(message.text == TEXT and message.finish_reason == "stop" for message in messages)
    assert [message.logprobs[0].logprob for message in messages] == sorted(LOGPROBS)[:-3:-1]
    assert all(message.usage.completion_tokens == len(message.token_ids) for message in messages)
    assert all(message.stages.attempts == 1 for message in messages)
    assert [[entry.logprob for entry in message.prompt_logprobs] for message in messages] == [
        [-0.25 * place for place in range(1, messages[0].usage.prompt_tokens)]
    ] * 2


async def test_sampling_parameters_are_checked(stub: rpc.InferenceStub) -> None:
    for sampling, field in (
        (pb.Sampling(min_p=2.0), "min_p"),
        (pb.Sampling(presence_penalty=-2.5), "presence_penalty"),
        (pb.Sampling(repetition_penalty=0.0), "repetition_penalty"),
        (pb.Sampling(logit_bias={5000: 1.0}), "logit_bias"),
        (pb.Sampling(bad_words=[" "]), "bad_words"),
        (pb.Sampling(prompt_logprobs=21), "prompt_logprobs"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(stub, pb.GenerateRequest(text="a", sampling=sampling))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (refused.value.details() or "").startswith(f"{field}: ")


async def test_stop_string_and_sequences(stub: rpc.InferenceStub) -> None:
    request = pb.GenerateRequest(text="a", stop=[" and"], n=2)
    texts = {0: "", 1: ""}
    for message in await generate(stub, request):
        texts[message.index] += message.text
    assert texts == dict.fromkeys((0, 1), "class Wörld: pass")


async def test_min_tokens_outlast_a_stop_string(stub: rpc.InferenceStub) -> None:
    request = pb.GenerateRequest(text="a", stop=["W"], sampling=pb.Sampling(min_tokens=30, max_tokens=30))
    last = (await generate(stub, request))[-1]
    assert last.finish_reason == "length"
    assert last.usage.completion_tokens == 30


@pytest.mark.parametrize(
    ("request_", "field", "words"),
    [
        (pb.GenerateRequest(), "input", "one of text, tokens and chat"),
        (pb.GenerateRequest(tokens=pb.TokenIds()), "prompt", "at least one token"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[7] * 1024)), "prompt", "limit of 1024"),
        (pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=float("nan"))), "temperature", "from 0.0"),
        (pb.GenerateRequest(text="a", sampling=pb.Sampling(max_tokens=9999)), "max_tokens", "limit of 1024"),
        (pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="robot")])), "messages", "unknown role"),
    ],
)
async def test_impossible_requests(stub: rpc.InferenceStub, request_: pb.GenerateRequest, field: str, words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=words) as refused:
        await generate(stub, request_)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("baton-field", field) in list(refused.value.trailing_metadata())


async def test_unknown_model(stub: rpc.InferenceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await generate(stub, pb.GenerateRequest(model="gpt", text="a"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_deadline_and_cancel_reach_the_workers(router: Router, stub: rpc.InferenceStub) -> None:
    decode = router.cluster.workers["d1"]
    for worker in router.cluster.workers.values():
        worker.open.clear()
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await generate(stub, pb.GenerateRequest(text="a"), timeout=0.1)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await decode.until_received("abort", 1)
    call = stub.Generate(pb.GenerateRequest(text="a"))
    await decode.until_received("reserve", 3)  # the canary's, the late one's, this one's
    call.cancel()
    await decode.until_received("abort", 2)


async def test_abort_ends_the_stream(router: Router, stub: rpc.InferenceStub) -> None:
    for worker in router.cluster.workers.values():
        worker.open.clear()
    call = stub.Generate(pb.GenerateRequest(text="a", request_id="mine"))
    await router.cluster.workers["d1"].until_received("reserve", 2)
    assert (await stub.Abort(pb.AbortRequest(request_id="mine"))).found
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        await call.read()
    assert ended.value.code() is grpc.StatusCode.CANCELLED
    assert not (await stub.Abort(pb.AbortRequest(request_id="mine"))).found


async def test_overload_carries_retry_after() -> None:
    spec = RouterSpec(admission="queue_length", max_queue=1)
    async with running_router(Role.MIXED, router=spec) as router, grpc.aio.insecure_channel(router.grpc) as channel:
        stub = rpc.InferenceStub(channel)
        router.cluster.workers["m0"].open.clear()
        held = stub.Generate(pb.GenerateRequest(text="a"))
        await router.cluster.workers["m0"].until_received("submit", 2)
        with pytest.raises(grpc.aio.AioRpcError) as shed:
            await generate(stub, pb.GenerateRequest(text="a"))
        assert shed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = {key: value for key, value in shed.value.trailing_metadata()}  # noqa: C416
        assert int(metadata["retry-after-ms"]) > 0
        held.cancel()


async def test_information(router: Router, stub: rpc.InferenceStub) -> None:
    model = await stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_model_len, list(model.eos_token_ids)) == ("pydoc", 1024, [1, 4])
    info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (info.cluster, info.router_id, info.ready, info.not_ready_reason) == ("test", "r0", True, "")
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert [(w.worker_id, w.role, w.state) for w in load.workers] == [("d1", "decode", "ready"), ("p0", "prefill", "ready")]
    assert load.workers[0].epoch == router.cluster.workers["d1"].epoch
    assert load.workers[0].free_blocks == 64
    assert (load.active_requests, load.pending_requests) == (0, 0)


async def test_health_follows_the_workers(router: Router) -> None:
    await router.cluster.workers["d1"].die()
    await until_health(router.grpc, health_pb2.HealthCheckResponse.NOT_SERVING)
    await router.cluster.replace("d1")
    await until_health(router.grpc, health_pb2.HealthCheckResponse.SERVING)


async def test_reflection(router: Router) -> None:
    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async with grpc.aio.insecure_channel(router.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_what_is_too_long_is_refused_before_it_is_encoded(stub: rpc.InferenceStub) -> None:
    many = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hello world " * 5)] * 4000)
    for request, words in (
        (pb.GenerateRequest(text="a b " * 100_000), "or more tokens"),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[5] * 100_000)), "100000 or more tokens"),
        (pb.GenerateRequest(chat=many), "messages: "),
        (pb.GenerateRequest(chat=pb.ChatMessages()), "messages: give 1 to"),
        (pb.GenerateRequest(text="a", request_id="x" * 257), "request_id: at most 256"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await generate(stub, request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (refused.value.details() or "")
