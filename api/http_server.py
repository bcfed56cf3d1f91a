"""The HTTP face: OpenAI's API, health, readiness and metrics, on the router's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..core.errors import BatonError, Cancelled, InternalError, InvalidRequest
from ..core.slo import Slo
from ..observability.metrics import CONTENT_TYPE, Metrics
from ..router.readiness import Readiness
from ..router.service import RouterService
from .bad_words import bad_word_tokens
from .body import read_body
from .errors import error_body, http_error
from .generation import Generation, Piece, joined, merged
from .http_protocol import ImpatientProtocol
from .model_info import ModelInfo
from .openai_format import ChatStyle, CompletionStyle, Json, JsonObject, PromptText, Style, model_entry, model_list, usage
from .openai_types import ChatRequest, Common, CompletionRequest
from .structured import Form
from .tokenizer import TextTokenizer
from .tool_style import ToolStyle
from .tools import tool_format
from .validation import Parameters, check_length, check_model, shown, to_submission

_T = TypeVar("_T")

TIMEOUT_HEADER = "x-request-timeout"  # seconds that the client is willing to wait
STALL_TIMEOUT = 60.0  # seconds in which a streaming client must read something


class HttpFace:
    """Validates, tokenises, streams. All decisions are the router's."""

    def __init__(
        self,
        service: RouterService,
        readiness: Readiness,
        metrics: Metrics,
        model: ModelInfo,
        tokenizer: TextTokenizer,
        slo: Slo | None = None,
    ) -> None:
        self._service = service
        self._readiness = readiness
        self._metrics = metrics
        self._model = model
        self._tokenizer = tokenizer
        self._slo = slo
        self._created = int(time.time())

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._render_metrics),
            Route("/metrics/targets", self._targets),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        handlers = {BatonError: _on_baton_error, HTTPException: _on_http_exception, Exception: _on_bug}
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> JSONResponse:
        if self._readiness.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": self._readiness.reason}, 503)

    async def _render_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _targets(self, request: Request) -> JSONResponse:
        """Where each router's own metrics are, as Prometheus discovers targets over HTTP (`http_sd_configs`)."""
        routers = self._service.peers.routers
        return JSONResponse(
            [{"targets": [router.http_address], "labels": {"router": router.worker.worker_id}} for router in routers]
        )

    async def _models(self, request: Request) -> JSONResponse:
        return JSONResponse(model_list(self._model, self._created))

    async def _one_model(self, request: Request) -> JSONResponse:
        check_model(request.path_params["name"] or "/", self._model)
        return JSONResponse(model_entry(self._model, self._created))

    async def _completions(self, request: Request) -> Response:
        body = await read_body(request, CompletionRequest)
        body.check()
        check_model(body.model or "", self._model)
        timeout = _timeout(request)
        prompts = [await self._encode(prompt) for prompt in body.prompts()]
        parameters = [body.parameters(prompt.tokens, timeout) for prompt in prompts]
        style = CompletionStyle(self._tokenizer, body, prompts)
        return await self._answer(request, body, await self._formed(parameters, body.form()), style)

    async def _chat(self, request: Request) -> Response:
        body = await read_body(request, ChatRequest)
        body.check()
        check_model(body.model or "", self._model)
        timeout = _timeout(request)
        messages = [message.plain(number) for number, message in enumerate(body.messages)]
        use, form = body.tool_use(), body.form()
        tools = () if use is None else use.tools
        written = None
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            written = tool_format(self._tokenizer.template, "tools" if tools else "messages")
        check_length(sum(self._tokenizer.least_tokens(each.content) for each in messages), self._model, "messages")
        prompt = await self._tokenizer.encode_chat(messages, [tool.described() for tool in tools])
        parameters, style = body.parameters(prompt, timeout), ChatStyle(self._tokenizer, body)
        if use is not None and written is not None:
            form = written.form(use, self._tokenizer.mark_id)
            parameters, style = replace(parameters, kept_tokens=written.marks), ToolStyle(self._tokenizer, body, use, written)
        return await self._answer(request, body, await self._formed([parameters], form), style)

    async def _encode(self, prompt: str | tuple[int, ...]) -> PromptText:
        if isinstance(prompt, tuple):
            return PromptText(None, prompt)
        check_length(self._tokenizer.least_tokens(prompt), self._model, "prompt")
        return PromptText(prompt, await self._tokenizer.encode(prompt))

    async def _formed(self, parameters: Sequence[Parameters], form: Form | None) -> Sequence[Parameters]:
        """With what the output must match, once that was found possible."""
        if form is None:
            return parameters
        await self._tokenizer.grammars.check(form)
        return [replace(each, grammar=form.grammar, grammar_field=form.field) for each in parameters]

    async def _answer(self, request: Request, body: Common, parameters: Sequence[Parameters], style: Style) -> Response:
        if body.bad_words:
            bad_words = await bad_word_tokens(body.bad_words, self._tokenizer)
            parameters = [replace(each, bad_words=bad_words) for each in parameters]
        answer = Answer(self._start(parameters), style, self._model.name, 1 if body.n is None else body.n)
        if not body.stream:
            return await _unless_disconnected(request, answer)
        stream = EventStream(answer, body.include_usage)
        try:
            await _race(request, stream.begin())
        except BaseException:
            await stream.close()
            raise
        return stream

    def _start(self, parameters: Sequence[Parameters]) -> list[Generation]:
        """All prompts are checked before the first is submitted; one that is refused takes the others with it."""
        capacity = self._service.membership.token_capacity()
        submissions = [to_submission(each, self._model, capacity) for each in parameters]
        generations: list[Generation] = []
        try:
            for submission, each in zip(submissions, parameters, strict=True):
                generations.append(Generation(self._service, submission, each, self._tokenizer))
        except BatonError:
            for generation in generations:
                generation.cancel()
            raise
        return generations


class Answer:
    """One HTTP answer in the making: `n` choices for each prompt."""

    def __init__(self, generations: list[Generation], style: Style, model: str, n: int) -> None:
        self.generations = generations
        self.style = style
        self.n = n
        self._model = model
        self._created = int(time.time())
        self.id = f"{style.id_prefix}{generations[0].id}"

    def cancel(self) -> None:
        for generation in self.generations:
            generation.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index of the choice, piece)."""
        async for number, piece in merged(self.generations):
            yield number * self.n + piece.index, piece

    async def whole(self) -> JsonObject:
        """Wait for everything."""
        count = len(self.generations) * self.n
        parts: list[list[Piece]] = [[] for _ in range(count)]
        async for index, piece in self.pieces():
            parts[index].append(piece)
        pieces = [joined(each) for each in parts]
        choices = [self.style.choice(index, piece) for index, piece in enumerate(pieces)]
        answer = {**self._envelope(self.style.object_name, choices), "usage": usage(self.generations)}
        return {**answer, **self.style.of_prompt(pieces[0])}

    def chunk(self, choice: JsonObject) -> JsonObject:
        return self._envelope(self.style.chunk_name, [choice])

    def usage_chunk(self) -> JsonObject:
        return {**self._envelope(self.style.chunk_name, []), "usage": usage(self.generations)}

    def _envelope(self, name: str, choices: Sequence[JsonObject]) -> JsonObject:
        return {"id": self.id, "object": name, "created": self._created, "model": self._model, "choices": choices}


class EventStream(Response):
    """Server-sent events as OpenAI writes them. Ends the request when the client goes away."""

    def __init__(self, answer: Answer, include_usage: bool) -> None:
        headers = {"cache-control": "no-cache", "x-request-id": answer.generations[0].id}
        super().__init__(None, 200, headers, "text/event-stream")
        del self.headers["content-length"]
        self._answer = answer
        self._include_usage = include_usage
        self._pieces = answer.pieces()
        self._first: tuple[int, Piece] | None = None
        self._opened: set[int] = set()

    async def begin(self) -> None:
        """Wait for the first piece: until then an error still has a status code of its own."""
        self._first = await anext(self._pieces, None)

    async def close(self) -> None:
        self._answer.cancel()
        await self._pieces.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(_disconnected(receive))
        watcher.add_done_callback(lambda _: self._answer.cancel())
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in self._events():
                async with asyncio.timeout(STALL_TIMEOUT):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client is gone, or has stopped reading (TimeoutError is one)
            pass
        finally:
            watcher.cancel()
            await self.close()

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            if self._first is not None:
                yield self._event(*self._first)
            async for index, piece in self._pieces:
                yield self._event(index, piece)
            if self._include_usage:
                yield _event(self._answer.usage_chunk())
        except BatonError as error:
            yield _event(http_error(error)[1])
        yield b"data: [DONE]\n\n"

    def _event(self, index: int, piece: Piece) -> bytes:
        answer = self._answer
        opening = answer.style.opening(index) if index not in self._opened else None
        self._opened.add(index)
        choices = [opening] if opening is not None else []
        choices.append(answer.style.delta(index, piece))
        extra: JsonObject = {"usage": None} if self._include_usage else {}
        return b"".join(_event({**answer.chunk(choice), **extra}) for choice in choices)


class HttpServer:
    """uvicorn on sockets of ours, without its signal handlers and its ten wake-ups a second."""

    def __init__(self, app: Starlette, listeners: Sequence[socket.socket]) -> None:
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            date_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = _QuietServer(config)
        self._listeners = list(listeners)

    async def serve(self) -> None:
        """Until `stop`."""
        await self._server.serve(sockets=self._listeners)

    def stop(self) -> None:
        self._server.stop()


class _QuietServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopped.set()

    async def main_loop(self) -> None:
        await self._stopped.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _unless_disconnected(request: Request, answer: Answer) -> Response:
    try:
        body = await _race(request, answer.whole())
    finally:
        answer.cancel()
    return JSONResponse(body, headers={"x-request-id": answer.generations[0].id})


async def _race(request: Request, work: Awaitable[_T]) -> _T:
    """The result of `work`, or Cancelled as soon as the client has disconnected."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client disconnected")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _timeout(request: Request) -> float | None:
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = float("nan")
    if not 0 <= seconds < float("inf"):
        raise InvalidRequest(f"{TIMEOUT_HEADER}: it must be a number of seconds, not {shown(value)}", TIMEOUT_HEADER)
    return seconds


def _event(body: Json | dict[str, dict[str, str | None]]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


# ---- errors in OpenAI's shape ---------------------------------------------------------------------


async def _on_baton_error(request: Request, error: Exception) -> Response:
    known = error if isinstance(error, BatonError) else InternalError(str(error))
    status, body, headers = http_error(known)
    return JSONResponse(body, status, dict(headers))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, "invalid_request_error", None, None), error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body(f"the router failed: {error}", "server_error", None, "internal"), 500)
