"""Protobuf messages of the router's side <-> the types of `core` and `router.events`."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.request import Attempt, FinishReason, Request, TokenLogprob, WorkerRef
from ..core.view import WorkerLoad
from ..proto import worker_pb2 as pb
from .sequence import TokenRun


def worker_to(ref: WorkerRef) -> pb.WorkerId:
    return pb.WorkerId(worker_id=ref.worker_id, epoch=ref.epoch)


def worker_from(message: pb.WorkerId) -> WorkerRef:
    return WorkerRef(message.worker_id, message.epoch)


def attempt_to(attempt: Attempt) -> pb.AttemptId:
    return pb.AttemptId(request_id=attempt.request_id, number=attempt.number)


def attempt_from(message: pb.AttemptId) -> Attempt:
    return Attempt(message.request_id, message.number)


def spec_to(attempt: Attempt, request: Request, output: Iterable[int], now: float) -> pb.SequenceSpec:
    """What a worker is told of a sequence: the prompt and every token that the client already has."""
    sampling = request.sampling
    spec = pb.SamplingSpec(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        sequence_index=sampling.sequence_index,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        logprobs=sampling.logprobs,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        biased_tokens=[token for token, _ in sampling.logit_bias],
        biases=[bias for _, bias in sampling.logit_bias],
        bad_words=[pb.TokenSequence(tokens=tokens) for tokens in sampling.bad_words],
        prompt_logprobs=sampling.prompt_logprobs,
        grammar=sampling.grammar or "",
    )
    return pb.SequenceSpec(
        attempt=attempt_to(attempt),
        prompt=request.prompt,
        output=output,
        sampling=spec,
        priority=request.priority,
        age=max(0.0, now - request.arrival),
    )


def run_from(message: pb.SequenceTokens) -> TokenRun:
    """One sequence's part of a token batch."""
    return TokenRun(
        position=message.position,
        tokens=tuple(message.tokens),
        logprobs=tuple(_logprob_from(logprob) for logprob in message.logprobs),
        finish=FinishReason(message.finish) if message.finish else None,
        computing=message.computing,
        cached_tokens=message.cached_tokens,
        prompt_logprobs=tuple(map(_logprob_from, message.prompt_logprobs)),
    )


def load_from(message: pb.Heartbeat) -> WorkerLoad:
    return WorkerLoad(
        step=message.step,
        in_step=message.in_step,
        predicted_step=message.predicted_step,
        prefill_rate=message.prefill_rate,
        decode_step=message.decode_step,
        num_waiting=message.num_waiting,
        num_running=message.num_running,
        free_blocks=message.free_blocks,
        total_blocks=message.total_blocks,
        quarantined_blocks=message.quarantined_blocks,
        tickets=message.tickets,
        others_assigned=message.others_assigned,
        others_pending_tokens=message.others_pending_tokens,
        others_context_tokens=message.others_context_tokens,
    )


def _logprob_from(message: pb.SpecLogprob) -> TokenLogprob:
    return TokenLogprob(message.token, message.logprob, tuple(zip(message.top_tokens, message.top_logprobs, strict=True)))
