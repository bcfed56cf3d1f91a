"""Protobuf messages of the worker's side <-> the types of `core`."""

from __future__ import annotations

from collections.abc import Iterable

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
    sampling = message.sampling
    return SequenceSpec(
        attempt=attempt_from(message.attempt),
        prompt=tuple(message.prompt),
        output=tuple(message.output),
        sampling=SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            sequence_index=sampling.sequence_index,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=tuple(sampling.stop_token_ids),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
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
    )


def attempts_from(messages: Iterable[pb.AttemptId]) -> tuple[Attempt, ...]:
    return tuple(attempt_from(message) for message in messages)


def _logprob_to(logprob: TokenLogprob) -> pb.SpecLogprob:
    return pb.SpecLogprob(
        token=logprob.token,
        logprob=logprob.logprob,
        top_tokens=[token for token, _ in logprob.top],
        top_logprobs=[value for _, value in logprob.top],
    )
