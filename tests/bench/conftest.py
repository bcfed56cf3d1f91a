"""A small OpenAI-compatible server that does exactly what a test scripts: real sockets, hand-made bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest

Script = Callable[["Call"], Awaitable[None]]


@dataclass
class Call:
    """One request as the server sees it, and the means to answer."""

    body: dict[str, object]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def start(self, status: int = 200, content_type: str = "text/event-stream") -> None:
        head = f"HTTP/1.1 {status} Whatever\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.writer.write(head.encode())
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        self.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self.writer.drain()

    async def event(self, content: object, end: str = "\n\n") -> None:
        text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"))
        await self.send(f"data: {text}{end}".encode())

    async def text(self, text: str, finish_reason: str | None = None) -> None:
        await self.event({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None})

    async def finish(self, num_tokens: int | None = None, prompt_tokens: int = 7) -> None:
        if num_tokens is not None:
            await self.event({"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": num_tokens}})
        await self.event("[DONE]")
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()


async def plain_answer(call: Call) -> None:
    """One event per token, the last with the finish reason, then usage."""
    wanted = call.body["max_tokens"]
    assert isinstance(wanted, int)
    await call.start()
    for number in range(wanted):
        await call.text(f" {number}", "length" if number == wanted - 1 else None)
    await call.finish(wanted)


@dataclass
class FakeServer:
    """`script` answers POST /v1/completions; calls are kept in order of arrival."""

    script: Script = plain_answer
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET /v1/models"):
                body = b'{"object":"list","data":[{"id":"fake"}]}'
                length = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + length.encode() + body)
                await writer.drain()
                return
            assert head.startswith("POST /v1/completions HTTP/1.1"), head
            length = next(line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length"))
            call = Call(json.loads(await reader.readexactly(int(length))), reader, writer)
            self.calls.append(call)
            await self.script(call)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.hung_up.set()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(script: Script = plain_answer) -> AsyncIterator[FakeServer]:
    fake = FakeServer(script)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.close()


@pytest.fixture
async def fake_server() -> AsyncIterator[FakeServer]:
    async with serving() as fake:
        yield fake
