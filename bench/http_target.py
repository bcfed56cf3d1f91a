"""An OpenAI-compatible server under load: streamed POST /v1/completions.

The hot path looks at an event's bytes only; JSON is read until the first token came, and of the last events, for the
finish reason and the usage. Each request opens a connection of its own, as a new client would.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from ..core.errors import InvalidRequest, Unavailable
from ..simulator.workload.planned import PlannedRequest
from .driver import Exchange, RequestFailed
from .prompts import PromptSource
from .sse import BadResponse, EventSplitter, ResponseParser

DIAL_TIMEOUT = 10.0
MAX_ERROR_BYTES = 64 << 10
_NO_CHOICES = (b'"choices":[]', b'"choices": []')
TAIL_EVENTS = 3
"""Last token, finish reason and usage come in at most three events."""


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """A server's base URL taken apart: `prefix` ends in /v1."""

    host: str
    port: int
    prefix: str
    tls: bool

    @staticmethod
    def parse(url: str) -> HttpAddress:
        """Of http(s)://host[:port][/path][/v1]. Raises InvalidRequest."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidRequest(f"url: {url!r}: {error}", "url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"url: {url!r} is no URL like http://host:8000", "url")
        path = parts.path.rstrip("/")
        tls = parts.scheme == "https"
        return HttpAddress(parts.hostname, port or (443 if tls else 80), path if path.endswith("/v1") else path + "/v1", tls)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


async def ask_models(url: str, api_key: str | None = None) -> list[str]:
    """Names of the models that a server serves. Raises Unavailable when nobody, or something else, answers there."""
    address = HttpAddress.parse(url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(timeout=DIAL_TIMEOUT, headers=headers, trust_env=False) as client:
            response = await client.get(f"{address}/models")
        response.raise_for_status()
        return [str(model["id"]) for model in response.json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"no OpenAI-compatible server answers at {address}/models: {error or type(error).__name__}") from None


class HttpTarget:
    """Implements `driver.Target`.

    token_ids   send prompts as token ids; else as text
    ignore_eos  ask for exactly the planned number of tokens, with the extension fields ignore_eos and min_tokens
    usage       ask for the token counts with stream_options (else chunks are counted)
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompts: PromptSource,
        *,
        token_ids: bool = True,
        ignore_eos: bool = True,
        usage: bool = True,
        api_key: str | None = None,
    ) -> None:
        self._address = HttpAddress.parse(url)
        self._model = model
        self._prompts = prompts
        self._token_ids = token_ids
        self._ignore_eos = ignore_eos
        self._usage = usage
        self._tls = ssl.create_default_context() if self._address.tls else None
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {self._address.prefix}/completions HTTP/1.1\r\nHost: {self._address.authority}\r\n"
            f"Content-Type: application/json\r\nAccept: text/event-stream\r\n{authorization}Connection: close\r\n"
        )

    @property
    def name(self) -> str:
        return f"{self._address} ({self._model})"

    def prepare(self, planned: PlannedRequest) -> bytes:
        as_ids = self._token_ids and planned.prompt is None
        body: dict[str, object] = {
            "model": self._model,
            "prompt": self._prompts.token_ids(planned) if as_ids else self._prompts.text(planned),
            "max_tokens": planned.output_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self._usage:
            body["stream_options"] = {"include_usage": True}
        if self._ignore_eos:
            body |= {"ignore_eos": True, "min_tokens": planned.output_tokens}
        encoded = json.dumps(body, separators=(",", ":")).encode()
        return f"{self._head}Content-Length: {len(encoded)}\r\n\r\n".encode() + encoded

    async def exchange(self, prepared: bytes, exchange: Exchange) -> None:
        loop = asyncio.get_running_loop()
        completion = _Completion(exchange, loop.create_future())
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await loop.create_connection(lambda: completion, self._address.host, self._address.port, ssl=self._tls)
            transport.write(prepared)
            await completion.ended
        except OSError as error:
            raise RequestFailed("connection", f"{self._address.authority}: {error.strerror or error}") from None
        finally:
            completion.ended.cancel()  # what the connection still says is of no interest
            if transport is not None:
                transport.abort()
            completion.settle()

    async def close(self) -> None:
        """Nothing is kept open between requests."""


class _Completion(asyncio.Protocol):
    """One streamed completion. `ended` resolves when it is over, well or with RequestFailed."""

    def __init__(self, exchange: Exchange, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self._exchange = exchange
        self._response = ResponseParser()
        self._splitter = EventSplitter()
        self._tail: deque[bytes] = deque(maxlen=TAIL_EVENTS)
        self._silent: list[float] = []  # events without text before the first with text
        self._refusal = b""
        self._done = False

    def data_received(self, data: bytes) -> None:
        if self.ended.done():
            return
        now = time.monotonic()
        try:
            body = self._response.feed(data)
            if self._response.status != 200:
                self._refusal += body[: MAX_ERROR_BYTES - len(self._refusal)]
            elif body:
                for event in self._splitter.feed(body):
                    self._take(event, now)
            if self._response.complete:
                self._end()
        except (BadResponse, RequestFailed) as error:
            self._fail(error if isinstance(error, RequestFailed) else RequestFailed("bad response", str(error)))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if self._response.end():
            self._end()
        else:
            self._fail(RequestFailed("disconnected", f"the connection broke before the answer's end{f': {exc}' if exc else ''}"))

    def settle(self) -> None:
        """Read usage and finish reason, and decide which events were tokens. Called once, when it is over."""
        exchange = self._exchange
        closing: dict[str, object] | None = None
        for event in self._tail:
            answer = _json(event)
            usage = answer.get("usage")
            if isinstance(usage, dict):
                exchange.num_tokens = _whole(usage.get("completion_tokens"))
                exchange.prompt_tokens = _whole(usage.get("prompt_tokens"))
            closing = _choice(answer) or closing
        if closing is not None:
            exchange.finish_reason = str(closing.get("finish_reason") or "")
        times = self._silent + exchange.chunk_times
        if exchange.finish_reason and closing is not None and not _carries_tokens(closing) and len(times) > exchange.num_tokens:
            times.pop()  # the finish reason came in an event of its own
        if len(times) > exchange.num_tokens:
            times = times[len(self._silent) :]  # there were events before the first token; else each was a token without text
        exchange.chunk_times[:] = times
        exchange.num_tokens = exchange.num_tokens or len(times)

    def _take(self, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self._done = True
            return
        self._tail.append(event)
        if b'"error"' in event:  # cannot be part of a text: there, quotes are escaped
            error = _json(event).get("error")
            if error:
                raise RequestFailed("stream error", _error_text(error))
        if self._exchange.chunk_times:
            if not any(form in event for form in _NO_CHOICES):
                self._exchange.chunk_times.append(now)
            return
        choice = _choice(_json(event))
        if choice is not None:
            (self._exchange.chunk_times if _carries_tokens(choice) else self._silent).append(now)

    def _end(self) -> None:
        status = self._response.status
        if status != 200:
            self._fail(RequestFailed(f"http {status}", _refusal_text(self._refusal)))
        elif not self._done and not any(b'"finish_reason":"' in event.replace(b" ", b"") for event in self._tail):
            self._fail(RequestFailed("cut short", "the stream ended without a finish reason and without [DONE]"))
        else:
            self.ended.set_result(None)

    def _fail(self, error: RequestFailed) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


def _json(event: bytes) -> dict[str, object]:
    """Empty when it is no JSON object: an answer without tokens is a failure anyway."""
    try:
        answer = json.loads(event)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _choice(answer: dict[str, object]) -> dict[str, object] | None:
    choices = answer.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None


def _carries_tokens(choice: dict[str, object]) -> bool:
    return bool(choice.get("text") or choice.get("token_ids"))


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _error_text(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _refusal_text(body: bytes) -> str:
    """What a refusal says: OpenAI's error object, FastAPI's detail, or plain text."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body[:500].decode(errors="replace").strip() or "no explanation"
    if isinstance(answer, dict):
        return _error_text(answer.get("error") or answer.get("message") or answer.get("detail") or answer)
    return str(answer)
