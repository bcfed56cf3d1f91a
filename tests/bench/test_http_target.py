"""The HTTP target against a scripted server: what counts as a token, and what counts as a failure."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from baton.bench.driver import Exchange, RequestFailed, run_load, warm_up
from baton.bench.http_target import HttpAddress, HttpTarget, ask_models
from baton.bench.prompts import PromptSource
from baton.bench.records import RequestRecord
from baton.core.errors import InvalidRequest, Unavailable
from baton.simulator.workload.planned import PlannedRequest

from .conftest import Call, FakeServer

HOLD = 0.02


def target(server: FakeServer, **options: bool) -> HttpTarget:
    return HttpTarget(server.url, "fake", PromptSource(0), **options)


async def one(server: FakeServer, output_tokens: int = 4, **options: bool) -> RequestRecord:
    result = await run_load(target(server, **options), [PlannedRequest(0, 0.0, 9, output_tokens)], request_timeout=10.0)
    return result.records[0]


async def test_a_plain_answer_and_the_request_that_asked_for_it(fake_server: FakeServer) -> None:
    record = await one(fake_server, 5)
    assert record.ok
    assert (record.num_tokens, record.prompt_tokens, record.finish_reason) == (5, 7, "length")
    assert len(record.chunk_times) == 5
    assert list(record.chunk_times) == sorted(record.chunk_times)
    body = fake_server.calls[0].body
    assert body["prompt"] == PromptSource(0).token_ids(PlannedRequest(0, 0.0, 9, 5))
    assert body | {"prompt": None} == {
        "model": "fake",
        "prompt": None,
        "max_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_a_server_that_takes_only_plain_fields_gets_only_those(fake_server: FakeServer) -> None:
    record = await one(fake_server, token_ids=False, ignore_eos=False, usage=False)
    assert record.ok
    assert set(fake_server.calls[0].body) == {"model", "prompt", "max_tokens", "temperature", "stream"}
    assert isinstance(fake_server.calls[0].body["prompt"], str)


async def test_times_are_those_of_the_tokens(fake_server: FakeServer) -> None:
    async def slow(call: Call) -> None:
        await call.start()
        await call.event({"choices": [{"text": "", "finish_reason": None}]})  # neither text nor tokens: no first token yet
        for number in range(3):
            await asyncio.sleep(HOLD)
            await call.text("x", "length" if number == 2 else None)
        await asyncio.sleep(HOLD)
        await call.finish(3)

    fake_server.script = slow
    record = await one(fake_server, 3)
    assert record.ttft is not None
    assert record.tpot is not None
    assert record.latency is not None
    assert record.ttft >= HOLD
    assert record.tpot >= HOLD * 0.9  # the gaps are at the server; at the client they may be a little shorter
    assert record.latency >= 4 * HOLD
    assert len(record.chunk_times) == 3


async def test_usage_counts_when_a_chunk_carries_several_tokens(fake_server: FakeServer) -> None:
    async def lumpy(call: Call) -> None:
        await call.start()
        await call.text("one")
        await asyncio.sleep(HOLD)
        await call.text("two three four", "length")
        await call.finish(4)

    fake_server.script = lumpy
    record = await one(fake_server)
    assert (record.num_tokens, len(record.chunk_times)) == (4, 2)
    assert record.tpot == pytest.approx((record.chunk_times[1] - record.chunk_times[0]) / 3)


async def test_a_finish_reason_in_an_event_of_its_own_is_no_token(fake_server: FakeServer) -> None:
    async def separate(call: Call) -> None:
        await call.start()
        await call.text("a")
        await call.text("b")
        await asyncio.sleep(HOLD)
        await call.text("", "stop")
        await call.finish(2 if "stream_options" in call.body else None)

    fake_server.script = separate
    for usage in (True, False):
        record = await one(fake_server, usage=usage)
        assert (record.num_tokens, len(record.chunk_times), record.finish_reason) == (2, 2, "stop")
        assert record.latency is not None
        assert record.latency - record.chunk_times[-1] >= HOLD * 0.9


async def test_tokens_without_text_count_when_the_usage_says_so(fake_server: FakeServer) -> None:
    async def silent(call: Call) -> None:
        await call.start()
        for reason in (None, None, "length"):
            await call.text("", reason)
        await call.finish(3)

    fake_server.script = silent
    record = await one(fake_server, 3)
    assert record.ok
    assert (record.num_tokens, len(record.chunk_times)) == (3, 3)


async def test_crlf_events_comments_and_spaces_in_the_json(fake_server: FakeServer) -> None:
    async def other_style(call: Call) -> None:
        await call.start()
        await call.send(b": ping\r\n\r\n")
        await call.event('{"choices": [{"text": "a", "finish_reason": null}]}', "\r\n\r\n")
        await call.event('{"choices": [{"text": "b", "finish_reason": "stop"}]}', "\r\n\r\n")
        await call.event('{"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 3}}', "\r\n\r\n")
        await call.event("[DONE]", "\r\n\r\n")
        call.writer.write(b"0\r\n\r\n")

    fake_server.script = other_style
    record = await one(fake_server)
    assert (record.num_tokens, len(record.chunk_times), record.prompt_tokens, record.finish_reason) == (2, 2, 3, "stop")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error":{"message":"the queue is full","code":429}}', "the queue is full"),
        (b'{"detail":"not now"}', "not now"),
        (b"<h1>busy</h1>", "<h1>busy</h1>"),
        (b"", "no explanation"),
    ],
)
async def test_a_refusal_is_a_failure_with_the_servers_words(fake_server: FakeServer, body: bytes, message: str) -> None:
    async def refuse(call: Call) -> None:
        await call.start(429, "application/json")
        if body:
            await call.send(body)
        call.writer.write(b"0\r\n\r\n")

    fake_server.script = refuse
    record = await one(fake_server)
    assert not record.ok
    assert (record.error, record.message, record.chunk_times) == ("http 429", message, ())
    assert record.end is not None


async def test_an_error_inside_the_stream(fake_server: FakeServer) -> None:
    async def fail(call: Call) -> None:
        await call.start()
        await call.text('"error" in a text is none')
        await call.event({"error": {"message": "worker lost"}})
        await call.finish()

    fake_server.script = fail
    record = await one(fake_server)
    assert (record.error, record.message, len(record.chunk_times)) == ("stream error", "worker lost", 1)


async def test_a_connection_that_breaks_mid_stream(fake_server: FakeServer) -> None:
    async def vanish(call: Call) -> None:
        await call.start()
        await call.text("a")

    fake_server.script = vanish
    record = await one(fake_server)
    assert (record.error, record.num_tokens) == ("disconnected", 1)


async def test_a_stream_that_ends_properly_but_too_early(fake_server: FakeServer) -> None:
    async def stop_short(call: Call) -> None:
        await call.start()
        await call.text("a")
        call.writer.write(b"0\r\n\r\n")

    fake_server.script = stop_short
    assert (await one(fake_server)).error == "cut short"


async def test_an_answer_that_is_no_http(fake_server: FakeServer) -> None:
    async def babble(call: Call) -> None:
        call.writer.write(b"220 smtp ready\r\n\r\n")
        await call.writer.drain()

    fake_server.script = babble
    assert (await one(fake_server)).error == "bad response"


async def test_nobody_listens(unused_tcp_port: int) -> None:
    address = f"http://127.0.0.1:{unused_tcp_port}"
    dead = HttpTarget(address, "m", PromptSource())
    record = (await run_load(dead, [PlannedRequest(0, 0.0, 4, 4)])).records[0]
    assert record.error == "connection"
    assert str(unused_tcp_port) in record.message
    with pytest.raises(Unavailable, match=str(unused_tcp_port)):
        await ask_models(address)


async def test_a_timeout_gives_the_connection_up(fake_server: FakeServer) -> None:
    gone = asyncio.Event()

    async def hang(call: Call) -> None:
        await call.start()
        await call.text("a")
        with contextlib.suppress(ConnectionError):
            assert await call.reader.read() == b""
        gone.set()

    fake_server.script = hang
    result = await run_load(target(fake_server), [PlannedRequest(0, 0.0, 4, 4)], request_timeout=0.2)
    assert (result.records[0].error, result.records[0].num_tokens) == ("timeout", 1)
    await asyncio.wait_for(gone.wait(), 5)


async def test_cancelling_closes_the_connection(fake_server: FakeServer) -> None:
    begun, gone = asyncio.Event(), asyncio.Event()

    async def hang(call: Call) -> None:
        begun.set()
        with contextlib.suppress(ConnectionError):
            assert await call.reader.read() == b""
        gone.set()

    fake_server.script = hang
    server = target(fake_server)
    task = asyncio.create_task(server.exchange(server.prepare(PlannedRequest(0, 0.0, 4, 4)), Exchange()))
    await asyncio.wait_for(begun.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(gone.wait(), 5)


async def test_models_and_the_warm_up(fake_server: FakeServer) -> None:
    assert await ask_models(fake_server.url + "/v1/") == ["fake"]
    await warm_up(target(fake_server), PlannedRequest(0, 0.0, 4, 4), 2)
    assert len(fake_server.calls) == 2
    assert fake_server.calls[0].body["prompt"] != fake_server.calls[1].body["prompt"]

    async def refuse(call: Call) -> None:
        await call.start(400)
        await call.send(b'{"error":{"message":"ignore_eos is not supported"}}')
        call.writer.write(b"0\r\n\r\n")

    fake_server.script = refuse
    with pytest.raises(Unavailable, match="4 tokens in, 4 out failed: http 400: ignore_eos is not supported"):
        await warm_up(target(fake_server), PlannedRequest(0, 0.0, 4, 4))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://host:8000", "http://host:8000/v1"),
        ("http://host:8000/", "http://host:8000/v1"),
        ("http://host/v1/", "http://host:80/v1"),
        ("https://host/proxy", "https://host:443/proxy/v1"),
        ("http://[::1]:9", "http://[::1]:9/v1"),
    ],
)
def test_urls(url: str, address: str) -> None:
    assert str(HttpAddress.parse(url)) == address


@pytest.mark.parametrize("url", ["host:8000", "ftp://host", "http://", "http://host:many"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(InvalidRequest, match="url"):
        HttpAddress.parse(url)


def test_a_failure_reads_well() -> None:
    assert str(RequestFailed("http 429", "slow down")) == "http 429: slow down"
