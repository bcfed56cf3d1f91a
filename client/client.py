"""The Python client of a Baton router, over gRPC: `Client` and, with the same methods, `AsyncClient`.

    with Client("127.0.0.1:8900") as client:
        print(client.generate("Once upon a time", max_tokens=50)[0].text)
        for chunk in client.stream([{"role": "user", "content": "Hello"}]):
            print(chunk.text, end="", flush=True)

A prompt is a text, token ids, or chat messages. Errors are those of `baton.core.errors`. Breaking out of a
stream, or closing it, cancels the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TypeVar, Unpack

import grpc

from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as rpc
from .messages import (
    Collector,
    GenerateOptions,
    Prompt,
    chunk_from,
    error_from,
    load_from,
    model_from,
    request_to,
    server_info_from,
)
from .types import Chunk, Completion, Load, Model, ServerInfo

__all__ = ["AsyncClient", "Client", "GenerateOptions", "Prompt"]

DEFAULT_TIMEOUT = 10.0  # seconds for the short calls

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection per client: that is what several routers share out
)
_Self = TypeVar("_Self", bound="Client")


class Client:
    """Talks to the router at `address` (host:port). Safe to share between threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = rpc.InferenceStub(self._channel)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running streams end."""
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> list[Completion]:
        """Wait for all `n` sequences; they come ordered by index."""
        collector = Collector()
        for chunk in self.stream(prompt, **options):
            collector.add(chunk)
        return collector.completions()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[Chunk]:
        """Chunks as they come, those of different sequences interleaved."""
        call = self._stub.Generate(request_to(prompt, options), timeout=options.get("timeout"))
        try:
            for message in call:
                yield chunk_from(message)
        except grpc.RpcError as error:
            raise error_from(error, self._address) from error
        finally:
            call.cancel()

    def abort(self, request_id: str) -> bool:
        """End a running request; False when there is none of that name."""
        request = pb.AbortRequest(request_id=request_id)
        try:
            return bool(self._stub.Abort(request, timeout=DEFAULT_TIMEOUT).found)
        except grpc.RpcError as error:
            raise error_from(error, self._address) from error

    def model(self) -> Model:
        """The served model."""
        try:
            return model_from(self._stub.GetModel(pb.GetModelRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.RpcError as error:
            raise error_from(error, self._address) from error

    def server_info(self) -> ServerInfo:
        """The router, and whether it is ready."""
        try:
            return server_info_from(self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.RpcError as error:
            raise error_from(error, self._address) from error

    def load(self) -> Load:
        """The workers, and what they are doing."""
        try:
            return load_from(self._stub.GetLoad(pb.GetLoadRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.RpcError as error:
            raise error_from(error, self._address) from error


class AsyncClient:
    """`Client` for asyncio. Create it inside the running event loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = rpc.InferenceStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; running streams end."""
        await self._channel.close(None)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> list[Completion]:
        """Wait for all `n` sequences; they come ordered by index."""
        collector = Collector()
        async for chunk in self.stream(prompt, **options):
            collector.add(chunk)
        return collector.completions()

    async def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncIterator[Chunk]:
        """Chunks as they come, those of different sequences interleaved."""
        call = self._stub.Generate(request_to(prompt, options), timeout=options.get("timeout"))
        try:
            async for message in call:
                yield chunk_from(message)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._address) from error
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> bool:
        """End a running request; False when there is none of that name."""
        request = pb.AbortRequest(request_id=request_id)
        try:
            return bool((await self._stub.Abort(request, timeout=DEFAULT_TIMEOUT)).found)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._address) from error

    async def model(self) -> Model:
        """The served model."""
        try:
            return model_from(await self._stub.GetModel(pb.GetModelRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._address) from error

    async def server_info(self) -> ServerInfo:
        """The router, and whether it is ready."""
        try:
            return server_info_from(await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._address) from error

    async def load(self) -> Load:
        """The workers, and what they are doing."""
        try:
            return load_from(await self._stub.GetLoad(pb.GetLoadRequest(), timeout=DEFAULT_TIMEOUT))
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._address) from error
