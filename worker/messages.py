"""Protobuf messages of the worker's side <-> the types of `core`."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.observed import ObservedStep
from ..core.request import Attempt, SamplingParams, SequenceSpec, TokenLogprob, WorkerRef
from ..core.step import TokenEvent
from ..core.view import WorkerLoad
from ..proto import worker_pb2 as pb


def attempt_from(message: pb.AttemptId) -> Attempt:
    return Attempt(message.request_id, message.number)


def attempt_to(attempt: Attempt) -> pb.AttemptId:
    return pb.AttemptId(request_id=attempt.request_id, number=attempt.number)


def worker_from(message: pb.WorkerId) -> WorkerRef:
    return WorkerRef(message.worker_id, message.epoch)


def worker_to(ref: WorkerRef) -> pb.WorkerId:
    return pb.WorkerId(worker_id=ref.worker_id, epoch=ref.epoch)


def spec_from(message: pb.SequenceSpec, now: float, hand_over: bool) -> SequenceSpec:
    """The sequence a router asks for; its arrival at the router, by this worker's clock."""
    return SequenceSpec(
        attempt=attempt_from(message.attempt),
        prompt=tuple(message.prompt),
        output=tuple(message.output),
        sampling=_sampling_from(message.sampling),
        priority=message.priority,
        arrival=now - message.age,
        hand_over=hand_over,
    )


def tokens_to(event: TokenEvent, computing: float, cached_tokens: int) -> pb.SequenceTokens:
    """One sequence's part of a token batch."""
    return pb.SequenceTokens(
        attempt=attempt_to(event.attempt),
        position=event.position,
        tokens=event.tokens,
        logprobs=[_logprob_to(logprob) for logprob in event.logprobs],
        finish=event.finish or "",
        computing=computing,
        cached_tokens=cached_tokens,
        prompt_logprobs=[_logprob_to(logprob) for logprob in event.prompt_logprobs],
    )


def heartbeat_to(load: WorkerLoad, draining: bool) -> pb.Heartbeat:
    return pb.Heartbeat(
        step=load.step,
        in_step=load.in_step,
        predicted_step=load.predicted_step,
        prefill_rate=load.prefill_rate,
        decode_step=load.decode_step,
        num_waiting=load.num_waiting,
        num_running=load.num_running,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        quarantined_blocks=load.quarantined_blocks,
        tickets=load.tickets,
        draining=draining,
        others_assigned=load.others_assigned,
        others_pending_tokens=load.others_pending_tokens,
        others_context_tokens=load.others_context_tokens,
    )


def step_to(step: ObservedStep) -> pb.ObservedStep:
    shape = step.shape
    return pb.ObservedStep(
        prefill_rows=shape.prefill_rows,
        prefill_tokens=shape.prefill_tokens,
        prefill_pairs=shape.prefill_pairs,
        prefill_context=shape.prefill_context,
        decode_rows=shape.decode_rows,
        decode_context=shape.decode_context,
        sampled=shape.sampled,
        seconds=step.seconds,
        period=step.period,
    )


def attempts_from(messages: Iterable[pb.AttemptId]) -> tuple[Attempt, ...]:
    return tuple(attempt_from(message) for message in messages)


def _sampling_from(message: pb.SamplingSpec) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        seed=message.seed,
        sequence_index=message.sequence_index,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(zip(message.biased_tokens, message.biases, strict=True)),
        bad_words=tuple(tuple(word.tokens) for word in message.bad_words),
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        grammar=message.grammar or None,
    )


def _logprob_to(logprob: TokenLogprob) -> pb.SpecLogprob:
    return pb.SpecLogprob(
        token=logprob.token,
        logprob=logprob.logprob,
        top_tokens=[token for token, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )
