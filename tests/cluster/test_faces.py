"""The public faces of a real cluster: OpenAI's own client, raw HTTP and gRPC against the model that ships."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
from baton.client.client import AsyncClient
from baton.core.errors import Cancelled, DeadlineExceeded, InvalidRequest, ModelNotFound
from baton.tests.cluster.live_cluster import PROMPT, LiveCluster, live, topology
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from openai.types import Completion
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

BROKEN = "\ufffd"


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(logs: Path) -> AsyncIterator[LiveCluster]:
    async with live(topology("faces"), logs) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(cluster: LiveCluster) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{cluster.http}", timeout=60) as raw:
        yield raw


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: LiveCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@dataclass
class Streamed:
    """One choice of a stream, put together."""

    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)


async def streamed(client: openai.AsyncOpenAI, **asked: object) -> tuple[dict[int, Streamed], int]:
    """The choices of a streamed completion, and its completion tokens."""
    choices: dict[int, Streamed] = {}
    usage = None
    stream = await client.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    async for chunk in stream:
        assert usage is None, "the usage chunk is the last"
        usage = chunk.usage
        assert (usage is None) == bool(chunk.choices)
        for choice in chunk.choices:
            seen = choices.setdefault(choice.index, Streamed())
            assert seen.finish is None, "nothing follows the finish reason"
            seen.text += choice.text
            seen.finish = choice.finish_reason
            if choice.logprobs:
                seen.tokens += choice.logprobs.tokens
                seen.values += choice.logprobs.token_logprobs
                seen.offsets += choice.logprobs.text_offset
    assert usage is not None
    return choices, usage.completion_tokens


async def test_a_stream_equals_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    """Text, tokens, log probabilities and usage; hot enough for tokens that are pieces of characters."""
    for seed in (1, 2, 3):
        asked = {
            "model": "pydoc",
            "prompt": "Ünï 🙂 def ",
            "max_tokens": 40,
            "seed": seed,
            "temperature": 1.9,
            "n": 3,
            "logprobs": 2,
        }
        whole: Completion = await client.completions.create(**asked)  # type: ignore[call-overload]
        choices, num_tokens = await streamed(client, **asked)
        assert whole.usage is not None
        assert num_tokens == whole.usage.completion_tokens == sum(len(choice.tokens) for choice in choices.values())
        assert len({choice.text for choice in whole.choices}) == 3
        for choice in whole.choices:
            logprobs, other = choice.logprobs, choices[choice.index]
            assert logprobs is not None
            assert (other.text, other.finish) == (choice.text, choice.finish_reason)
            assert (other.tokens, other.offsets) == (logprobs.tokens, logprobs.text_offset)
            assert other.values == pytest.approx(logprobs.token_logprobs, abs=1e-3)  # batches differ, so does rounding
            for token, at in zip(other.tokens, other.offsets, strict=True):
                assert BROKEN in token or token.startswith("<|") or choice.text.startswith(token, at)


async def test_a_seed_repeats_the_answer_and_no_seed_does_not(client: openai.AsyncOpenAI) -> None:
    async def text(seed: int | None) -> str:
        answer = await client.completions.create(model="pydoc", prompt=PROMPT, max_tokens=24, temperature=1.5, seed=seed)
        return answer.choices[0].text

    assert await text(7) == await text(7) != await text(8)
    assert await text(None) != await text(None)


async def test_stop_strings_across_tokens(client: openai.AsyncOpenAI) -> None:
    asked = {"model": "pydoc", "prompt": "def ", "max_tokens": 30, "temperature": 0}
    text = (await client.completions.create(**asked)).choices[0].text  # type: ignore[call-overload]
    assert len(text) > 40
    for at in range(0, len(text) - 4, 9):
        stop = text[at : at + 4]
        whole = await client.completions.create(**asked, stop=["never said", stop])  # type: ignore[call-overload]
        choices, num_tokens = await streamed(client, **asked, stop=stop)
        assert whole.choices[0].text == choices[0].text == text[: text.index(stop)]
        assert whole.choices[0].finish_reason == choices[0].finish == "stop"
        assert whole.usage.completion_tokens == num_tokens


async def test_chat_with_logprobs(client: openai.AsyncOpenAI) -> None:
    asked = {
        "model": "pydoc",
        "messages": [{"role": "user", "content": "What does os.path.join do?"}],
        "max_completion_tokens": 24,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }
    whole = await client.chat.completions.create(**asked)  # type: ignore[call-overload]
    choice = whole.choices[0]
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    for entry in choice.logprobs.content:
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert [top.logprob for top in entry.top_logprobs] == sorted((top.logprob for top in entry.top_logprobs), reverse=True)
    spoken = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content if not entry.token.startswith("<|"))
    assert spoken.decode("utf-8", "replace") == choice.message.content
    parts, finishes = [], []
    async for chunk in await client.chat.completions.create(**asked, stream=True):  # type: ignore[call-overload]
        parts.append(chunk.choices[0].delta.content or "")
        finishes.append(chunk.choices[0].finish_reason)
    assert "".join(parts) == choice.message.content
    assert finishes[-1] == choice.finish_reason
    assert finishes[:-1] == [None] * (len(finishes) - 1)


async def test_server_sent_events_to_the_byte(http: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    response = await http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["id"] for chunk in chunks} == {f"cmpl-{response.headers['x-request-id']}"}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_prompts_up_to_the_models_limit(client: openai.AsyncOpenAI) -> None:
    for length, room in ((1022, 2), (1023, 1)):
        answer = await client.completions.create(model="pydoc", prompt=[9] * length, extra_body={"ignore_eos": True})
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (room, "length")
        with pytest.raises(openai.BadRequestError, match=f"at most {room} can be asked for"):
            await client.completions.create(model="pydoc", prompt=[9] * length, max_tokens=room + 1)
    with pytest.raises(openai.BadRequestError, match="prompt: 1024 tokens"):
        await client.completions.create(model="pydoc", prompt=[9] * 1024)


async def test_errors_through_official_clients(cluster: LiveCluster, client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == ["pydoc"]
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.completions.create(model="pydoc", prompt="a", logprobs=21)
    assert refused.value.param == "logprobs"
    with pytest.raises(ModelNotFound):
        await cluster.client.generate("a", model="gpt-4")
    with pytest.raises(InvalidRequest) as invalid:
        await cluster.client.generate("a", top_p=0.0)
    assert invalid.value.field == "top_p"


async def test_requests_that_share_an_id_and_aborts(cluster: LiveCluster) -> None:
    stream = cluster.client.stream(PROMPT, request_id="mine", max_tokens=500, ignore_eos=True)
    await anext(stream)
    with pytest.raises(InvalidRequest, match="in use"):
        await cluster.client.generate("a", request_id="mine")
    assert not await cluster.client.abort("somebody else's")
    assert await cluster.client.abort("mine")
    with pytest.raises(Cancelled):
        async for _ in stream:
            pass
    assert len(await cluster.client.generate("a", request_id="mine", max_tokens=1)) == 1
    await cluster.baseline()


async def test_deadlines_end_queued_and_running_work(cluster: LiveCluster, http: httpx.AsyncClient) -> None:
    pid = await cluster.strike("prefill-0", signal.SIGSTOP)
    try:
        late = {"x-request-timeout": "0.3"}
        calls = [http.post("/v1/completions", json={"prompt": f"{i}", "max_tokens": 4}, headers=late) for i in range(8)]
        answers = await asyncio.gather(*calls)
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(504, "deadline_exceeded")] * 8
    finally:
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(DeadlineExceeded):
        await cluster.client.generate(PROMPT, max_tokens=500, ignore_eos=True, timeout=0.5)
    await cluster.ready()
    await cluster.baseline()


async def test_health_and_reflection(cluster: LiveCluster) -> None:
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "baton.v1.Inference"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="baton.v1.Inference")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        async for described in stub.ServerReflectionInfo(iter([asked])):
            assert described.file_descriptor_response.file_descriptor_proto


async def test_metrics_and_one_log_line_for_a_request(cluster: LiveCluster, http: httpx.AsyncClient, logs: Path) -> None:
    await cluster.client.generate(PROMPT, max_tokens=5, ignore_eos=True, request_id="logged", tenant="team")
    text = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    series = {(sample.name, *sorted(sample.labels.values())): sample.value for sample in samples}
    ttft = series["baton_ttft_seconds_sum", "prefill", "prefill-0"]
    split = [series["baton_stage_seconds_sum", *sorted(("prefill", "prefill-0", stage))] for stage in ("queue", "prefill")]
    assert sum(split) == pytest.approx(ttft)
    for stage in ("handoff", "first_decode"):
        assert series["baton_stage_seconds_count", *sorted(("decode", "decode-0", stage))] > 0
    assert series["baton_tpot_seconds_count", "decode", "decode-0"] > 0
    assert series["baton_handoff_bytes_count", "shm"] > 0
    assert series["baton_requests_active",] == 0
    assert series["baton_ready",] == 1
    lines = [json.loads(line) for line in (logs / "router-0.log").read_text().splitlines()]  # every line is JSON
    (logged,) = [line for line in lines if line.get("client_request_id") == "logged"]
    assert (logged["outcome"], logged["output_tokens"], logged["tenant"]) == ("ok", 5, "team")
    assert (logged["prefill_worker"], logged["decode_worker"]) == ("prefill-0", "decode-0")
    assert logged["queue"] + logged["prefill"] == pytest.approx(logged["ttft"], abs=1e-5)
    assert logged["total"] >= logged["ttft"] + logged["handoff"] + logged["first_decode"]


async def test_hostile_bodies_leave_the_router_alone(cluster: LiveCluster, http: httpx.AsyncClient) -> None:
    json_type = {"content-type": "application/json"}
    for body in (
        json.dumps({"prompt": [{}] * 300_000}).encode(),
        b'{"prompt": "' + b"a" * (20 << 20) + b'"}',
        b'{"prompt": "' + b"hello world " * 400_000 + b'"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
    ):
        stream = cluster.client.stream(PROMPT, max_tokens=50, ignore_eos=True)
        await anext(stream)
        refused = await http.post("/v1/completions", content=body, headers=json_type)
        assert refused.status_code in (400, 413)
        assert refused.json()["error"]["type"] == "invalid_request_error"
        last = None
        async for chunk in stream:
            last = chunk
        assert last is not None
        assert last.usage is not None
        assert last.stages is not None
        assert last.usage.completion_tokens == 50
        assert last.stages.attempts == 1  # no worker was taken for dead meanwhile
    await cluster.baseline()


async def test_two_hundred_streams_at_once(cluster: LiveCluster) -> None:
    async def one(index: int) -> int:
        (completion,) = await cluster.client.generate(f"{index} {PROMPT}", max_tokens=12, ignore_eos=True)
        return completion.usage.completion_tokens

    assert await asyncio.gather(*(one(index) for index in range(200))) == [12] * 200
    await cluster.baseline()


async def test_not_ready_while_a_pool_is_gone(cluster: LiveCluster, http: httpx.AsyncClient) -> None:
    await cluster.strike("decode-0")
    reasons = []
    async with asyncio.timeout(10):
        while not reasons:
            answer = await http.get("/ready")
            if answer.status_code == 503:
                reasons.append(answer.json()["reason"])
    assert reasons[0]
    assert (await http.get("/health")).status_code == 200
    await cluster.ready()
    assert (await http.get("/ready")).status_code == 200
    async with AsyncClient(cluster.grpc) as client:
        assert (await client.server_info()).ready
