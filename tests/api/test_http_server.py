"""The HTTP face over real sockets: OpenAI's own client, raw events, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from baton.api import body as http_body
from baton.api import http_protocol, http_server
from baton.api.openai_types import ChatRequest, CompletionRequest
from baton.api.validation import MAX_REQUEST_BYTES
from baton.core.topology import RouterSpec
from baton.core.view import Role
from baton.tests.router.router_process import Router, running_router, tokenizer
from pydantic import ValidationError

TEXT = "def wörks(x): return 🙂 and then some more words"


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    async with running_router(text=TEXT) as running:
        yield running


@pytest.fixture
async def client(router: Router) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


@pytest.fixture
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, timeout=20) as raw:
        yield raw


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == ["pydoc"]
    assert (await client.models.retrieve("pydoc")).owned_by == "baton"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-4")


async def test_completion(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt="Hello", max_tokens=100, temperature=0)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(await tokenizer().encode(TEXT, False)) + 1  # and the end token
    assert answer.usage.prompt_tokens == len(await tokenizer().encode("Hello"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id is not None


async def test_completion_defaults_to_sixteen_tokens(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt="Hello", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


async def test_completion_streams_the_same_text(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="pydoc", prompt=[5, 6, 7], max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == TEXT
    assert len(chunks) > 3
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 3


async def test_several_prompts_and_sequences(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt=["a", "b"], n=2, max_tokens=100, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [TEXT] * 4
    stream = await client.completions.create(model="pydoc", prompt=[[7], [8, 9]], n=2, max_tokens=100, stream=True)
    texts = [""] * 4
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [TEXT] * 4


async def test_completion_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt="a", max_tokens=4, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == 4
    assert logprobs.token_logprobs == [-0.5] * 4
    tops = logprobs.top_logprobs or []
    assert [top[token] for top, token in zip(tops, logprobs.tokens or [], strict=True)] == [-0.5] * 4
    assert sorted(tops[0].values()) == [-1.5, -0.5]
    offsets, text = logprobs.text_offset or [], answer.choices[0].text
    whole = [(at, token) for at, token in zip(offsets, logprobs.tokens or [], strict=True) if "\ufffd" not in token]
    assert len(whole) == 2  # "def", " w" and the two halves of a character
    assert all(text.startswith(token, at) for at, token in whole)


async def test_chat(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    answer = await client.chat.completions.create(model="pydoc", messages=messages)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    messages += [answer.choices[0].message, {"role": "user", "content": "More"}]  # an answer can be sent back
    again = await client.chat.completions.create(model="pydoc", messages=messages, max_completion_tokens=1)
    assert again.choices[0].finish_reason == "length"


async def test_chat_renders_the_template(router: Router, client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(model="pydoc", messages=[{"role": "user", "content": "Hi"}], max_tokens=1)
    submit = [m.submit for m in router.cluster.workers["p0"].received if m.WhichOneof("body") == "submit"][-1]
    expected = await tokenizer().encode("<|bos|><|user|>Hi<|end|><|assistant|>", False)
    assert tuple(submit.sequence.prompt) == expected
    assert list(submit.sequence.sampling.stop_token_ids) == [1, 4]


async def test_chat_streams_with_logprobs(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="pydoc",
        messages=[{"role": "user", "content": "Hi"}],
        n=2,
        stream=True,
        logprobs=True,
        top_logprobs=1,
        stream_options={"include_usage": True},
    )
    texts, roles, tokens, finishes, usage = ["", ""], [], 0, [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finishes += [choice.finish_reason] if choice.finish_reason else []
            tokens += len((choice.logprobs.content or []) if choice.logprobs else [])
    assert texts == [TEXT, TEXT]
    assert roles == ["assistant", "assistant"]
    assert finishes == ["stop", "stop"]
    assert usage is not None
    assert usage.completion_tokens == tokens


async def test_stop_string_cuts_text_and_ends_the_work(router: Router, client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="pydoc", prompt="a", max_tokens=1000, stop=["never", " and"])
    assert answer.choices[0].text == TEXT[: TEXT.index(" and")]
    assert answer.choices[0].finish_reason == "stop"
    stream = await client.completions.create(model="pydoc", prompt="a", max_tokens=100, stop=" and", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT[: TEXT.index(" and")]
    await router.cluster.workers["d1"].until_received("abort")


async def test_raw_events(http: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 2, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        raw = "".join([part async for part in response.aiter_text()])
    events = raw.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: ") for event in events[:-1])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "text_completion"
    assert "usage" not in first


IMPOSSIBLE: list[tuple[str, dict[str, object], str, str]] = [
    ("completions", {}, "prompt", "required"),
    ("completions", {"prompt": "a", "best_off": 3}, "best_off", "not supported"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "None"),
    ("completions", {"prompt": "a", "temperature": "hot"}, "temperature", "number"),
    ("completions", {"prompt": "a", "temperature": -1}, "temperature", "from 0.0 to 2.0"),
    ("completions", {"prompt": "a", "top_p": 0}, "top_p", "more than 0"),
    ("completions", {"prompt": "a", "n": 0}, "n", "from 1 to"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "at least 1"),
    ("completions", {"prompt": "a", "max_tokens": 5000}, "max_tokens", "limit of 1024 tokens"),
    ("completions", {"prompt": [7] * 1024}, "prompt", "limit of 1024 tokens"),
    ("completions", {"prompt": [5000]}, "prompt", "vocabulary of 4096"),
    ("completions", {"prompt": []}, "prompt", "1 to 128"),
    ("completions", {"prompt": "a", "seed": -1}, "seed", "from 0"),
    ("completions", {"prompt": "a", "stop": [""]}, "stop", "1 to 256 characters"),
    ("completions", {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ("completions", {"prompt": "a", "min_tokens": 17}, "min_tokens", "from 0 to 16"),
    ("completions", {"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
    ("chat/completions", {"messages": []}, "messages", "at least 1"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages", "role"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools",
        "does not define tools",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
        "top_logprobs",
        "logprobs: true",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 5000},
        "max_completion_tokens",
        "limit of 1024 tokens",
    ),
]


async def test_impossible_requests_name_the_field(router: Router, http: httpx.AsyncClient) -> None:
    before = len(router.cluster.workers["p0"].received)
    for path, body, field, words in IMPOSSIBLE:
        response = await http.post(f"/v1/{path}", json=body)
        error = response.json()["error"]
        assert response.status_code == 400, (body, error)
        assert error["param"] == field
        assert field in error["message"]
        assert words in error["message"], (body, error)
        assert error["type"] == "invalid_request_error"
    sent = [m.WhichOneof("body") for m in router.cluster.workers["p0"].received[before:]]
    assert "submit" not in sent


HOSTILE: list[tuple[bytes, str | None, str]] = [
    (b'{"prompt": "\\ud800"}', None, "not valid JSON"),  # a lone surrogate is no text
    (b'{"messages": [], "prompt": "a"}', "messages", "not supported"),
    (b'{"prompt": "a", "seed": ' + b"9" * 400 + b"}", "seed", "from 0 to"),
    (b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}", "max_tokens", "exceed"),
    (b'{"prompt": "a", "top_p": NaN}', None, "not valid JSON"),
    (b'{"prompt": "a", "top_p": 1e999}', "top_p", "finite"),
    (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", None, "recursion limit"),
    (b'{"prompt": [1, "a"]}', "prompt", "prompt.1: Input should be a valid integer"),
    (b'{"prompt": {}}', "prompt", "a list of strings"),
    (b'{"prompt": "' + b"a b " * 100_000 + b'"}', "prompt", "or more tokens"),
    (b'{"prompt": ["a", "b", "c", "d", "e", "f", "g", "h", "i"], "n": 128}', "n", "1024 choices"),
    (b'{"prompt": "a", "user": "' + b"u" * 257 + b'"}', "user", "256 characters"),
    (b'{"prompt": "a", "stop_token_ids": [' + b"1," * 128 + b"1]}", "stop_token_ids", "at most 128"),
    (b"[]", None, "JSON object"),
]


@pytest.mark.parametrize(("body", "field", "words"), HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_bodies_are_refused(http: httpx.AsyncClient, body: bytes, field: str | None, words: str) -> None:
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field), error
    assert words in error["message"]
    assert len(error["message"]) < 400


async def test_chat_mistakes_are_found_where_they_are(http: httpx.AsyncClient) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    long = {"role": "user", "content": "hello world " * 400}
    for message, words in (
        ({"role": "user", "content": [{"type": "text", "text": "a"}, image]}, "messages.0.content.1"),
        ({"role": "user", "content": "a", "name": "bob"}, "messages.0.name: names of participants are not supported"),
        ({"role": "user", "content": None}, "messages.0.content: Input should be a string or a list of text parts"),
        (long, "messages: "),
    ):
        response = await http.post("/v1/chat/completions", json={"messages": [message]})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages"
        assert words in response.json()["error"]["message"]


def test_a_million_mistakes_make_one_error() -> None:
    for kind, fields in (
        (CompletionRequest, {"prompt": [{}] * 100_000}),
        (CompletionRequest, {f"k{i}": 1 for i in range(100_000)}),
        (ChatRequest, {"messages": [{"role": "x"}] * 4000}),
        (ChatRequest, {"messages": [{f"k{i}": 1 for i in range(100_000)}]}),
    ):
        with pytest.raises(ValidationError) as caught:
            kind.model_validate(fields)
        assert caught.value.error_count() <= 4


async def _connected(router: Router, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = router.http.partition(":")
    return await asyncio.open_connection(host, int(port), limit=limit)


async def test_bodies_have_limits(router: Router, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    json_type = {"content-type": "application/json"}
    large = await http.post("/v1/completions", content=b" " * (MAX_REQUEST_BYTES + 1), headers=json_type)
    assert large.status_code == 413
    assert str(MAX_REQUEST_BYTES) in large.json()["error"]["message"]
    form = await http.post("/v1/completions", data={"prompt": "a"})
    assert form.status_code == 415
    assert "application/json" in form.json()["error"]["message"]
    monkeypatch.setattr(http_body, "BODY_TIMEOUT", 0.05)
    reader, writer = await _connected(router)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    async with asyncio.timeout(4):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_connections_that_send_no_header_are_closed(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT", 0.1)
    whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    for first, then in ((b"", b""), (b"", b"GET /health HTTP/1.1\r\nHost:"), (whole, b"GET /he")):
        reader, writer = await _connected(router)
        if first:
            writer.write(first)
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(then)
        async with asyncio.timeout(4):  # less than the keep-alive of a connection that is merely idle
            await reader.read()
        writer.close()


async def test_a_client_that_stops_reading_is_given_up(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "STALL_TIMEOUT", 0.1)
    answer = json.dumps({"prompt": "a", "n": 64, "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20})
    reader, writer = await _connected(router, limit=1024)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}"
    writer.write(f"{head}\r\n\r\n{answer}".encode())
    await reader.readexactly(100)
    await router.cluster.workers["d1"].until_received("abort", 1)
    writer.close()


async def test_paths_and_methods(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        head = await http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert (await http.get("/v1/models/")).status_code == 404
    assert (await http.post("/v1/completions/", json={"prompt": "a"})).status_code == 404
    wrong = await http.put("/v1/completions", json={})
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_other_refusals(http: httpx.AsyncClient) -> None:
    unknown = await http.post("/v1/completions", json={"model": "gpt-4", "prompt": "a"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    broken = await http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert "JSON" in broken.json()["error"]["message"]
    nowhere = await http.post("/v1/embeddings", json={})
    assert nowhere.status_code == 404
    assert "/v1/embeddings" in nowhere.json()["error"]["message"]
    late = await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": "soon"})
    assert late.status_code == 400
    assert late.json()["error"]["param"] == "x-request-timeout"


async def test_deadline(router: Router, http: httpx.AsyncClient) -> None:
    for worker in router.cluster.workers.values():
        worker.open.clear()
    for stream in (False, True):
        response = await http.post(
            "/v1/completions", json={"prompt": "a", "stream": stream}, headers={"x-request-timeout": "0.05"}
        )
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_aborts_at_once(router: Router, http: httpx.AsyncClient, stream: bool) -> None:
    for worker in router.cluster.workers.values():
        worker.open.clear()
    call = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a", "stream": stream}))
    # The canary reserved and was granted once before.
    await router.cluster.workers["d1"].until_received("reserve", 2)
    call.cancel()
    await router.cluster.workers["d1"].until_received("abort", 1)
    await router.cluster.workers["p0"].until_received("abort", 1)


async def test_disconnect_in_the_middle_of_a_stream(router: Router, http: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "stream": True, "max_tokens": 500, "ignore_eos": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        await anext(response.aiter_lines())
        router.cluster.workers["d1"].open.clear()
    await router.cluster.workers["d1"].until_received("abort", 1)


async def test_overload() -> None:
    spec = RouterSpec(admission="queue_length", max_queue=1)
    async with running_router(Role.MIXED, router=spec) as router, httpx.AsyncClient(base_url=router.url) as http:
        worker = router.cluster.workers["m0"]
        worker.open.clear()
        first = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}))
        await worker.until_received("submit", 2)
        for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
            shed = await http.post("/v1/completions", json=body)
            assert shed.status_code == 429
            assert int(shed.headers["retry-after"]) >= 1
            assert shed.json()["error"]["type"] == "rate_limit_error"
        worker.open.set()
        assert (await first).status_code == 200


async def test_health_ready_and_metrics() -> None:
    async with (
        running_router(Role.PREFILL, wait_ready=False) as router,
        httpx.AsyncClient(base_url=router.url) as http,
    ):
        assert (await http.get("/health")).status_code == 200
        ready = await http.get("/ready")
        assert ready.status_code == 503
        assert "reason" in ready.json()


async def test_metrics_of_a_served_request(http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5, "user": "someone"})
    await http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": "0"})
    text = (await http.get("/metrics")).text
    assert 'baton_requests_total{outcome="ok"} 1.0' in text  # the canary is not counted
    assert 'baton_ttft_seconds_count{pool="prefill",worker="p0"} 1.0' in text
    assert 'baton_tpot_seconds_count{pool="decode",worker="d1"} 1.0' in text
    assert 'baton_itl_seconds_count{pool="decode",worker="d1"}' in text
    for stage in ("queue", "prefill", "handoff", "first_decode"):
        assert f'stage="{stage}"' in text
    assert 'baton_handoff_bytes_sum{transport="local"} 8192.0' in text  # the canary's too
    assert 'baton_worker_up{pool="decode",worker="d1"} 1.0' in text
    assert 'baton_worker_free_blocks{pool="prefill",worker="p0"} 64.0' in text
    assert "baton_ready 1.0" in text
    assert "baton_requests_active 0.0" in text


async def test_error_in_the_middle_of_a_stream_is_an_event(router: Router, client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model="pydoc",
        prompt="a",
        stream=True,
        max_tokens=500,
        extra_body={"ignore_eos": True},
        extra_headers={"x-request-timeout": "0.3"},
    )
    await anext(aiter(stream))
    router.cluster.workers["d1"].open.clear()
    with pytest.raises(openai.APIError, match="given up"):
        async for _ in stream:
            pass
