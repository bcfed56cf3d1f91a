"""The Python client, sync and async, against a router over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from baton.client.client import AsyncClient, Client
from baton.core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from baton.core.slo import Slo
from baton.core.topology import RouterSpec
from baton.core.view import Role
from baton.tests.router.router_process import Router, running_router

TEXT = "import wörld and more"


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with running_router(text=TEXT) as running:
        yield running


@pytest.fixture
async def client(router: Router) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.grpc) as connected:
        yield connected


async def test_generate_and_stream(client: AsyncClient) -> None:
    completions = await client.generate("Hello", temperature=0.0, n=2, slo=Slo(1.0, 0.1), timeout=20)
    assert [completion.text for completion in completions] == [TEXT, TEXT]
    assert [completion.index for completion in completions] == [0, 1]
    assert completions[0].finish_reason == "stop"
    assert completions[0].usage.completion_tokens == len(completions[0].token_ids)
    assert completions[0].stages.total > 0
    chunks = [chunk async for chunk in client.stream([{"role": "user", "content": "Hi"}], logprobs=1, stop=" and")]
    assert "".join(chunk.text for chunk in chunks) == "import wörld"
    assert chunks[-1].finish_reason == "stop"
    assert chunks[0].usage is None
    assert chunks[0].logprobs[0].logprob == -0.5


async def test_sampling_options(router: Router, client: AsyncClient) -> None:
    (completion,) = await client.generate(
        [5, 6, 7],
        min_p=0.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={9: 2.0},
        bad_words="rude",
        prompt_logprobs=1,
        stop=" and",
        include_stop_str_in_output=True,
        best_of=3,
    )
    assert completion.text == "import wörld and"
    assert [(entry.token, entry.logprob, len(entry.top)) for entry in completion.prompt_logprobs] == [(6, -0.25, 1), (7, -0.5, 1)]
    assert completion.logprobs == ()
    submits = [m.submit.sequence.sampling for m in router.cluster.workers["p0"].received if m.WhichOneof("body") == "submit"]
    sampling = submits[-1]
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.25, 0.5, -0.5)
    assert (sampling.repetition_penalty, list(sampling.biased_tokens), list(sampling.biases)) == (1.5, [9], [2.0])
    assert len(sampling.bad_words) == 2
    assert sampling.sequence_index == 2
    (first, *rest) = [chunk async for chunk in client.stream([5, 6], prompt_logprobs=0)]
    assert [entry.token for entry in first.prompt_logprobs] == [6]
    assert all(chunk.prompt_logprobs == () for chunk in rest)


async def test_information(client: AsyncClient) -> None:
    assert (await client.model()).name == "pydoc"
    assert (await client.server_info()).ready
    load = await client.load()
    assert [worker.role for worker in load.workers] == ["decode", "prefill"]


async def test_errors_are_typed(router: Router, client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="limit of 1024") as refused:
        await client.generate("a", max_tokens=5000)
    assert refused.value.field == "max_tokens"
    with pytest.raises(ModelNotFound):
        await client.generate("a", model="gpt")
    for impossible in ([{"content": "a"}], b"bytes", ["a", "b"]):
        with pytest.raises(InvalidRequest, match="prompt"):
            await client.generate(impossible)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        await client.generate("a", max_tokens=-1)
    for worker in router.cluster.workers.values():
        worker.open.clear()
    with pytest.raises(DeadlineExceeded):
        await client.generate("a", timeout=0.05)
    running = asyncio.create_task(client.generate("a", request_id="mine"))
    await router.cluster.workers["d1"].until_received("reserve", 3)
    assert await client.abort("mine")
    with pytest.raises(Cancelled):
        await running
    async with AsyncClient("127.0.0.1:1") as nowhere:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
            await nowhere.model()


async def test_overload_says_when_to_come_back() -> None:
    spec = RouterSpec(admission="queue_length", max_queue=1)
    async with running_router(Role.MIXED, router=spec) as router, AsyncClient(router.grpc) as client:
        router.cluster.workers["m0"].open.clear()
        held = asyncio.create_task(client.generate("a"))
        await router.cluster.workers["m0"].until_received("submit", 2)
        with pytest.raises(Overloaded) as shed:
            await client.generate("a")
        assert shed.value.retry_after > 0
        held.cancel()


async def test_leaving_a_stream_cancels_the_request(router: Router, client: AsyncClient) -> None:
    stream = client.stream("a", ignore_eos=True, max_tokens=900)
    await anext(stream)
    router.cluster.workers["d1"].open.clear()
    await stream.aclose()
    await router.cluster.workers["d1"].until_received("abort")


async def test_sync_client(router: Router) -> None:
    def use() -> None:
        with Client(router.grpc) as client:
            assert client.generate("Hello")[0].text == TEXT
            assert "".join(chunk.text for chunk in client.stream([5, 6])) == TEXT
            assert client.model().max_model_len == 1024
            assert client.server_info().router_id == "r0"
            assert len(client.load().workers) == 2
            assert not client.abort("nobody")
            with pytest.raises(InvalidRequest) as refused:
                client.generate("a", temperature=9.0)
            assert refused.value.field == "temperature"
            for _ in client.stream("a", ignore_eos=True, max_tokens=900):
                break

    await asyncio.to_thread(use)
    await router.cluster.workers["d1"].until_received("abort")


async def test_options_are_never_ignored(client: AsyncClient) -> None:
    for options, field in (({"max_token": 5}, "max_token"), ({"n": 0}, "n"), ({"best_of": 0}, "best_of"), ({"slo": 5}, "slo")):
        with pytest.raises(InvalidRequest) as refused:
            await client.generate("a", **options)  # type: ignore[arg-type]
        assert refused.value.field == field


async def test_a_message_too_large_is_not_called_overload(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="larger than max"):
        await client.generate("x" * (17 << 20))
    with pytest.raises(InvalidRequest, match="or more tokens") as refused:
        await client.generate("x" * (4 << 20))
    assert refused.value.field == "prompt"
