"""Baton under load over its own protocol: baton.v1.Inference/Generate. Token counts per chunk are exact."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from ..client.client import AsyncClient
from ..core.errors import BatonError, Unavailable
from ..proto import inference_pb2 as pb
from ..simulator.workload.planned import PlannedRequest
from .driver import Exchange, RequestFailed
from .prompts import PromptSource


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a Baton router says of itself."""

    name: str
    max_model_len: int
    vocab_size: int
    num_workers: int


async def ask_model(address: str) -> ServedModel:
    """The model behind a router. Raises Unavailable when no router answers there."""
    try:
        async with AsyncClient(address) as client:
            model, load = await client.model(), await client.load()
    except BatonError as error:
        raise Unavailable(f"no Baton router answers at {address} (`baton status` shows where one does): {error}") from error
    return ServedModel(model.name, model.max_model_len, model.vocab_size, len(load.workers))


class _Call(Protocol):
    def __aiter__(self) -> AsyncIterator[pb.GenerateResponse]: ...
    def cancel(self) -> bool: ...


class _Generate(Protocol):
    def __call__(self, request: bytes) -> _Call: ...


class GrpcTarget:
    """Implements `driver.Target`. Close it: it keeps one channel."""

    def __init__(self, address: str, model: str, prompts: PromptSource, *, ignore_eos: bool = True) -> None:
        self._address = address
        self._model = model
        self._prompts = prompts
        self._ignore_eos = ignore_eos
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", 16 << 20)])
        # No serializer for requests: they are prepared as bytes ahead of their time.
        self._generate: _Generate = self._channel.unary_stream(
            "/baton.v1.Inference/Generate", request_serializer=None, response_deserializer=pb.GenerateResponse.FromString
        )

    @property
    def name(self) -> str:
        return f"grpc://{self._address} ({self._model})"

    def prepare(self, planned: PlannedRequest) -> bytes:
        sampling = pb.Sampling(temperature=0.0, max_tokens=planned.output_tokens)
        if self._ignore_eos:
            sampling.ignore_eos = True
            sampling.min_tokens = planned.output_tokens
        request = pb.GenerateRequest(model=self._model, sampling=sampling)
        if planned.prompt is not None:
            request.text = planned.prompt
        else:
            request.tokens.ids.extend(self._prompts.token_ids(planned))
        return request.SerializeToString()

    async def exchange(self, prepared: bytes, exchange: Exchange) -> None:
        call = self._generate(prepared)
        try:
            async for response in call:
                if response.token_ids:
                    exchange.chunk_times.append(time.monotonic())
                    exchange.chunk_tokens.append(len(response.token_ids))
                    exchange.num_tokens += len(response.token_ids)
                if response.finish_reason:
                    exchange.finish_reason = response.finish_reason
                    if response.HasField("usage"):
                        exchange.prompt_tokens = response.usage.prompt_tokens
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"grpc {error.code().name}", error.details() or "no explanation") from None
        finally:
            call.cancel()  # harmless when it has ended
        if exchange.finish_reason in ("", "error", "abort"):
            raise RequestFailed("cut short", f"the stream ended with finish reason {exchange.finish_reason!r}")

    async def close(self) -> None:
        await self._channel.close(None)
