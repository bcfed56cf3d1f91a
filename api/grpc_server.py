"""The gRPC face: `baton.v1.Inference`, health checking and reflection."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TypeAlias

import grpc
from google.protobuf.message import Message as ProtoMessage
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..core.errors import BatonError, Cancelled, InvalidRequest
from ..core.request import TokenLogprob
from ..core.slo import Slo
from ..proto import inference_pb2 as pb
from ..proto import inference_pb2_grpc as rpc
from ..router.readiness import Readiness
from ..router.service import RouterService
from .bad_words import bad_word_tokens
from .chat import Message
from .errors import grpc_status
from .generation import Generation, Piece
from .model_info import ModelInfo
from .stall import StallGuard
from .structured import Form, any_object_form, choice_form, grammar_form, regex_form, schema_form
from .tokenizer import TextTokenizer
from .validation import MAX_MESSAGES, MAX_REQUEST_BYTES, Parameters, check_length, check_model, to_submission

Context: TypeAlias = "grpc.aio.ServicerContext[ProtoMessage, ProtoMessage]"

STALL_TIMEOUT = 60.0  # seconds in which a client must read something
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Inference"].full_name


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the router says of itself."""

    version: str
    cluster: str
    router_id: str
    slo: Slo
    started: float = 0.0


class InferenceFace(rpc.InferenceServicer):
    """Validates, tokenises, streams. All decisions are the router's."""

    def __init__(
        self, service: RouterService, readiness: Readiness, model: ModelInfo, tokenizer: TextTokenizer, info: ServerInfo
    ) -> None:
        self._service = service
        self._readiness = readiness
        self._model = model
        self._tokenizer = tokenizer
        self._info = info

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        try:
            generation = await self._start(request, context)
        except BatonError as error:
            await _abort(context, error)
            return

        responses = _Responses(generation)
        try:
            async with StallGuard(STALL_TIMEOUT) as guard:
                async for piece in generation:
                    guard.begin()
                    await context.write(responses.of(piece))
                    guard.end()
        except TimeoutError:
            await _abort(context, Cancelled(f"the client has read nothing for {STALL_TIMEOUT:g} s"))
        except BatonError as error:
            await _abort(context, error)
        finally:  # the client's cancel, its deadline, a broken connection: they cancel this coroutine
            generation.cancel()

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:  # noqa: N802
        name = request.request_id
        found = self._service.abort(name) or (not request.only_here and await self._service.peers.abort(name))
        return pb.AbortResponse(found=found)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # noqa: N802
        model = self._model
        return pb.GetModelResponse(
            name=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            dtype=model.dtype,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(  # noqa: N802
        self,
        request: pb.GetServerInfoRequest,
        context: Context,
    ) -> pb.GetServerInfoResponse:
        return pb.GetServerInfoResponse(
            version=self._info.version,
            cluster=self._info.cluster,
            router_id=self._info.router_id,
            ready=self._readiness.ready,
            not_ready_reason="" if self._readiness.ready else self._readiness.reason,
            uptime=time.monotonic() - self._info.started,
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:  # noqa: N802
        workers = [
            pb.WorkerInfo(
                worker_id=member.ref.worker_id,
                epoch=member.ref.epoch,
                role=member.role,
                state=member.state,
                assigned=len(member.attempts),
                waiting=member.load.num_waiting,
                running=member.load.num_running,
                free_blocks=member.load.free_blocks,
                total_blocks=member.total_blocks,
                quarantined_blocks=member.load.quarantined_blocks,
                tickets=member.load.tickets,
                step=member.load.step,
                pid=member.pid,
            )
            for member in self._service.membership.members
        ]
        active, pending = self._service.num_active, self._service.num_pending
        return pb.GetLoadResponse(workers=workers, active_requests=active, pending_requests=pending)

    async def _start(self, request: pb.GenerateRequest, context: Context) -> Generation:
        check_model(request.model, self._model)
        parameters = _parameters(request, await self._prompt(request), context.time_remaining(), self._info.slo)
        bad_words = await bad_word_tokens(request.sampling.bad_words, self._tokenizer)
        parameters = replace(parameters, bad_words=bad_words)
        form = _form(request)
        if form is not None:
            await self._tokenizer.grammars.check(form)
            parameters = replace(parameters, grammar=form.grammar, grammar_field=form.field)
        submission = to_submission(parameters, self._model, self._service.membership.token_capacity())
        return Generation(self._service, submission, parameters, self._tokenizer)

    async def _prompt(self, request: pb.GenerateRequest) -> tuple[int, ...]:
        match request.WhichOneof("input"):
            case "text":
                check_length(self._tokenizer.least_tokens(request.text), self._model, "prompt")
                return await self._tokenizer.encode(request.text)
            case "tokens":
                check_length(len(request.tokens.ids), self._model, "prompt")
                return tuple(request.tokens.ids)
            case "chat":
                count = len(request.chat.messages)
                if not 1 <= count <= MAX_MESSAGES:
                    raise InvalidRequest(f"messages: give 1 to {MAX_MESSAGES} messages, not {count}", "messages")
                messages = [Message(message.role, message.content) for message in request.chat.messages]
                check_length(sum(self._tokenizer.least_tokens(each.content) for each in messages), self._model, "messages")
                return await self._tokenizer.encode_chat(messages)
        raise InvalidRequest("input: one of text, tokens and chat must be set", "input")


class HealthFace:
    """grpc.health.v1: SERVING only while the router is ready."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._servicer.set(name, status)


def build_server(face: InferenceFace, health_face: HealthFace, shares_port: bool = False) -> grpc.aio.Server:
    """A server with every public service; not bound, not started. A taken port is an error, unless it is to be shared."""
    options = (
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_send_message_length", -1),
    )
    server = grpc.aio.server(options=options)
    rpc.add_InferenceServicer_to_server(face, server)
    health_face.add_to(server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server


def _parameters(request: pb.GenerateRequest, prompt: tuple[int, ...], timeout: float | None, default_slo: Slo) -> Parameters:
    sampling = request.sampling

    slo = default_slo
    if request.HasField("slo"):
        slo = Slo(request.slo.ttft or default_slo.ttft, request.slo.tpot or default_slo.tpot, default_slo.attainment)
    return Parameters(
        prompt=prompt,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature if sampling.HasField("temperature") else None,
        top_p=sampling.top_p if sampling.HasField("top_p") else None,
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop=tuple(request.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else None,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else None,
        logit_bias=tuple(sampling.logit_bias.items()),
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        include_stop=request.include_stop_str_in_output,
        n=request.n or 1,
        best_of=request.best_of or None,
        client_id=request.request_id,
        tenant=request.tenant,
        priority=request.priority,
        slo=slo,
        timeout=timeout,
    )


def _form(request: pb.GenerateRequest) -> Form | None:
    """What the output must match. Raises InvalidRequest."""
    wanted, field = request.structured_output, "structured_output"
    match wanted.WhichOneof("form"):
        case "json_schema":
            return schema_form(f"{field}.json_schema", wanted.json_schema)
        case "json_object":
            return any_object_form(f"{field}.json_object") if wanted.json_object else None
        case "regex":
            return regex_form(f"{field}.regex", wanted.regex)
        case "choice":
            return choice_form(f"{field}.choice", wanted.choice.texts)
        case "grammar":
            return grammar_form(f"{field}.grammar", wanted.grammar)
    if request.HasField(field):
        raise InvalidRequest(f"{field}: one of json_schema, json_object, regex, choice and grammar must be set", field)
    return None


class _Responses:
    """The messages of one request. All that carry nothing but tokens and text are one object: a write serialises it at once."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._plain = pb.GenerateResponse(request_id=generation.client_id)

    def of(self, piece: Piece) -> pb.GenerateResponse:
        if piece.finish is not None or piece.logprobs or piece.prompt_logprobs:
            return _response(self._generation, piece)
        plain = self._plain
        plain.index = piece.index
        plain.text = piece.text
        plain.ClearField("token_ids")
        plain.token_ids.extend(piece.tokens)
        return plain


def _response(generation: Generation, piece: Piece) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=generation.client_id,
        index=piece.index,
        token_ids=piece.tokens,
        text=piece.text,
        logprobs=[_logprob(logprob) for logprob in piece.logprobs],
        finish_reason=piece.finish or "",
        prompt_logprobs=[_logprob(logprob) for logprob in piece.prompt_logprobs],
    )
    if piece.finish is not None:
        stages = generation.stages(piece.index)
        response.usage.prompt_tokens = generation.num_prompt_tokens
        response.usage.completion_tokens = generation.num_output_tokens(piece.index)
        response.usage.cached_tokens = generation.num_cached_tokens
        response.stages.queue = stages.queue or 0.0
        response.stages.prefill = stages.prefill or 0.0
        response.stages.handoff = stages.handoff or 0.0
        response.stages.first_decode = stages.first_decode or 0.0
        response.stages.total = stages.total
        response.stages.attempts = generation.num_attempts(piece.index)
    return response


def _logprob(logprob: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=logprob.token,
        logprob=logprob.logprob,
        top_tokens=[token for token, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )


async def _abort(context: Context, error: BatonError) -> None:
    code, metadata = grpc_status(error)
    await context.abort(code, str(error), metadata)
