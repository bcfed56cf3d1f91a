"""Protobuf messages of the public service <-> the client's types and errors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict, cast

import grpc

from ..core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from ..core.slo import Slo
from ..proto import inference_pb2 as pb
from .types import Chunk, Completion, Load, Model, ServerInfo, Stages, TokenLogprob, Usage, Worker

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """What may be said about a request; what is left out, the server chooses.

    logprobs    report the sampled token's log probability and this many alternatives
    min_p       drop tokens less likely than this share of the likeliest one's probability
    presence_penalty, frequency_penalty  for tokens that were sampled before (-2 to 2): once, and for each time
    repetition_penalty  above 1, makes tokens of the prompt and the output less likely
    logit_bias  what is added to the logits of tokens (-100 to 100), by token id
    bad_words   words that the output must not contain
    prompt_logprobs  report the log probabilities of the prompt's tokens and this many alternatives
    include_stop_str_in_output  the text ends with the stop string, not before it
    json_schema, json_object, regex, choice, grammar  what the output must match; at most one of them: JSON of a schema
                (as text, or as an object), any JSON object, a regular expression, one of some texts, a grammar (Lark, GBNF)
    n           sequences to generate
    best_of     sequences to sample; the n of the highest log probability per token come back, when all have ended
    request_id  a name of your own, unique among running requests; `abort` takes it
    slo         objectives in seconds, where they differ from the cluster's
    timeout     seconds to wait; the server drops the request when they are over
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    min_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: str | Sequence[str]
    prompt_logprobs: int
    stop: str | Sequence[str]
    include_stop_str_in_output: bool
    json_schema: str | Mapping[str, object]
    json_object: bool
    regex: str
    choice: Sequence[str]
    grammar: str
    n: int
    best_of: int
    model: str
    request_id: str
    tenant: str
    priority: int
    slo: Slo
    timeout: float


def request_to(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """`prompt` is a text, token ids, or chat messages (`{"role": ..., "content": ...}`). Raises InvalidRequest."""
    _check_options(options)
    try:
        message = pb.GenerateRequest(
            model=options.get("model", ""),
            request_id=options.get("request_id", ""),
            sampling=_sampling_to(options),
            stop=_texts(options.get("stop", ())),
            include_stop_str_in_output=options.get("include_stop_str_in_output", False),
            n=options.get("n", 1),
            best_of=options.get("best_of", 0),
            tenant=options.get("tenant", ""),
            priority=options.get("priority", 0),
        )
        _set_prompt(message, prompt)
        _set_form(message, options)
    except (ValueError, TypeError) as error:  # another type, or out of the wire type's range
        raise InvalidRequest(f"the request cannot be written: {error}") from error
    if "slo" in options:
        message.slo.ttft, message.slo.tpot = options["slo"].ttft, options["slo"].tpot
    return message


def _set_form(message: pb.GenerateRequest, options: GenerateOptions) -> None:
    """What the output must match."""
    given = [name for name in ("json_schema", "json_object", "regex", "choice", "grammar") if name in options]
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: it cannot be given together with {given[0]}", given[1])
    wanted = message.structured_output
    if "json_schema" in options:
        schema = options["json_schema"]
        wanted.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    elif "json_object" in options:
        wanted.json_object = options["json_object"]
    elif "regex" in options:
        wanted.regex = options["regex"]
    elif "choice" in options:
        wanted.choice.texts.extend(options["choice"])
        wanted.choice.SetInParent()
    elif "grammar" in options:
        wanted.grammar = options["grammar"]


def chunk_from(message: pb.GenerateResponse) -> Chunk:
    last = bool(message.finish_reason)
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(_logprob_from(logprob) for logprob in message.logprobs),
        finish_reason=message.finish_reason or None,
        usage=_usage_from(message.usage) if last else None,
        stages=_stages_from(message.stages) if last else None,
        prompt_logprobs=tuple(_logprob_from(logprob) for logprob in message.prompt_logprobs),
    )


class Collector:
    """Puts the chunks of a request together."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Chunk]] = {}

    def add(self, chunk: Chunk) -> None:
        self._chunks.setdefault(chunk.index, []).append(chunk)

    def completions(self) -> list[Completion]:
        """One per sequence, by index. Raises Unavailable when the stream ended before they had."""
        return [_joined(self._chunks[index]) for index in sorted(self._chunks)]


def model_from(message: pb.GetModelResponse) -> Model:
    eos = tuple(message.eos_token_ids)
    return Model(message.name, message.max_model_len, message.vocab_size, message.dtype, eos)


def server_info_from(message: pb.GetServerInfoResponse) -> ServerInfo:
    return ServerInfo(
        version=message.version,
        cluster=message.cluster,
        router_id=message.router_id,
        ready=message.ready,
        not_ready_reason=message.not_ready_reason,
        uptime=message.uptime,
    )


def load_from(message: pb.GetLoadResponse) -> Load:
    workers = tuple(_worker_from(worker) for worker in message.workers)
    return Load(workers, message.active_requests, message.pending_requests)


def error_from(error: grpc.RpcError, address: str) -> BatonError:
    """The error of `core.errors` that a failed call stands for."""
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    details = error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else str(error)
    message = details or f"{code.name.lower()} from {address}"
    metadata = _metadata(error)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(message, metadata.get("baton-field"))
        case grpc.StatusCode.NOT_FOUND:
            return ModelNotFound(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            if "larger than max" in message:  # gRPC's own limit on the size of a message: a retry cannot help
                return InvalidRequest(f"{address}: {message}")
            return Overloaded(message, float(metadata.get("retry-after-ms", "1000")) / 1000)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message)
        case grpc.StatusCode.CANCELLED:
            return Cancelled(message)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(f"{address}: {message}")
    return InternalError(message)


def _check_options(options: GenerateOptions) -> None:
    """A misspelt option must not be ignored, and 0 sequences must not become the wire's default of 1."""
    unknown = next((name for name in options if name not in GenerateOptions.__annotations__), None)
    if unknown is not None:
        allowed = ", ".join(GenerateOptions.__annotations__)
        raise InvalidRequest(f"{unknown}: there is no such option; there are {allowed}", unknown)
    for name in ("n", "best_of"):
        if options.get(name) == 0:
            raise InvalidRequest(f"{name}: it must be at least 1, not 0", name)
    if "slo" in options and not isinstance(options["slo"], Slo):
        raise InvalidRequest(f"slo: give a baton.core.slo.Slo, not {options['slo']!r}", "slo")


def _set_prompt(message: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        message.text = prompt
        return
    if isinstance(prompt, bytes):
        raise InvalidRequest("prompt: bytes are neither text nor token ids; decode them first", "prompt")
    tokens = [entry for entry in prompt if isinstance(entry, int)]
    turns = [entry for entry in prompt if isinstance(entry, Mapping)]
    if len(tokens) == len(prompt):
        message.tokens.ids.extend(tokens)
        message.tokens.SetInParent()
        return
    if len(turns) != len(prompt) or any(set(turn) != {"role", "content"} for turn in turns):
        raise InvalidRequest('prompt: give a text, token ids, or messages with "role" and "content"', "prompt")
    message.chat.messages.extend(pb.ChatMessage(role=turn["role"], content=turn["content"]) for turn in turns)


def _sampling_to(options: GenerateOptions) -> pb.Sampling:
    return pb.Sampling(
        temperature=options.get("temperature"),
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
        seed=options.get("seed"),
        max_tokens=options.get("max_tokens"),
        min_tokens=options.get("min_tokens"),
        stop_token_ids=options.get("stop_token_ids", ()),
        ignore_eos=options.get("ignore_eos", False),
        logprobs=options.get("logprobs"),
        min_p=options.get("min_p"),
        presence_penalty=options.get("presence_penalty", 0.0),
        frequency_penalty=options.get("frequency_penalty", 0.0),
        repetition_penalty=options.get("repetition_penalty"),
        logit_bias=options.get("logit_bias", {}),
        bad_words=_texts(options.get("bad_words", ())),
        prompt_logprobs=options.get("prompt_logprobs"),
    )


def _texts(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _joined(chunks: Sequence[Chunk]) -> Completion:
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None or last.stages is None:
        raise Unavailable(f"the stream of request {last.request_id} ended before its sequence {last.index} did")
    return Completion(
        request_id=last.request_id,
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        stages=last.stages,
        prompt_logprobs=chunks[0].prompt_logprobs,
    )


def _logprob_from(message: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(message.token, message.logprob, tuple(zip(message.top_tokens, message.top_logprobs, strict=True)))


def _usage_from(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def _stages_from(message: pb.StageTimes) -> Stages:
    return Stages(
        queue=message.queue,
        prefill=message.prefill,
        handoff=message.handoff,
        first_decode=message.first_decode,
        total=message.total,
        attempts=message.attempts,
    )


def _worker_from(message: pb.WorkerInfo) -> Worker:
    return Worker(
        worker_id=message.worker_id,
        epoch=message.epoch,
        role=message.role,
        state=message.state,
        pid=message.pid,
        assigned=message.assigned,
        waiting=message.waiting,
        running=message.running,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        quarantined_blocks=message.quarantined_blocks,
        tickets=message.tickets,
        step=message.step,
    )


def _metadata(error: grpc.RpcError) -> dict[str, str]:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return {}
    pairs = cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ())
    return {key: value for key, value in pairs if isinstance(value, str)}
