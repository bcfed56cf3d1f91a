"""How a request ended: the lifecycle's verdict as an error, a finish reason and a record. Pure."""

from __future__ import annotations

from collections.abc import Callable

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
from ..core.request import FinishReason, WorkerRef
from ..observability.records import Place, RequestRecord, SequenceRecord
from .events import Complete
from .sequence import Sequence
from .stream import Stream

_KINDS: tuple[type[BatonError], ...] = (InvalidRequest, DeadlineExceeded, Cancelled, Unavailable, ModelNotFound)


def error_of(action: Complete) -> BatonError | None:
    """The error of `core.errors` that a Complete stands for; None when the request ended well."""
    if action.error is None:
        return None
    message = action.message or "the request was ended"
    if action.error == Overloaded.code:
        return Overloaded(message, action.retry_after or 1.0)
    kind = next((kind for kind in _KINDS if kind.code == action.error), InternalError)
    return kind(message)


def finish_of(sequence: Sequence, error: BatonError | None) -> FinishReason:
    """Why the sequence ended, given the error that ended it, if any."""
    if error is None:
        return sequence.wanted_finish or FinishReason.STOP
    return FinishReason.ABORT if isinstance(error, Cancelled) else FinishReason.ERROR


def record_of(stream: Stream, place: Callable[[WorkerRef], Place]) -> RequestRecord:
    """What metrics and logs are told of a request that is over. `place` gives the labels of a worker."""
    error = stream.error
    return RequestRecord(
        request_id=stream.id,
        client_id=stream.submission.client_id,
        tenant=stream.submission.tenant,
        outcome=error.code if error is not None else "ok",
        message=str(error) if error is not None else "",
        prompt_tokens=len(stream.submission.prompt),
        sequences=tuple(
            SequenceRecord(
                stages=sequence.stages(),
                output_tokens=len(sequence.tokens),
                cached_tokens=sequence.cached_tokens,
                attempts=sequence.num_attempts,
                finish=sequence.finish or "",
                first=place(sequence.first_worker) if sequence.first_worker else None,
                rest=place(sequence.rest_worker) if sequence.rest_worker else None,
            )
            for sequence in stream.sequences
        ),
        retries=tuple(reason for sequence in stream.sequences for reason in sequence.retries),
    )
