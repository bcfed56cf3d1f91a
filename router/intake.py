"""Tokens on their way from a worker's batch into the logs of their sequences, and the news of them to streams and lifecycle.

More of the router's own time is spent here than anywhere else: the plain case comes first, and takes no objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from ..core.request import Attempt, WorkerRef
from ..observability.metrics import Metrics
from ..observability.records import Place
from ..proto import worker_pb2 as pb
from .events import Event, Finished, FirstToken, Progress
from .sequence import Sequence, TokenGap, TokenRun
from .stream import Stream
from .wire import attempt_from, run_from

PROGRESS_EVERY = 32  # tokens between two Progress events of a sequence


class IntakeOwner(Protocol):
    """The router service."""

    def post(self, event: Event) -> None: ...

    def place(self, worker: WorkerRef) -> Place:
        """Labels of a worker."""
        ...

    def attempt_failed(self, worker: WorkerRef, attempt: Attempt, kind: str, report: pb.AttemptFailed) -> None: ...


class TokenIntake:
    """Takes batches. `running` is the owner's: sequences by their ids, each with the stream that reads it."""

    def __init__(self, owner: IntakeOwner, running: Mapping[str, tuple[Sequence, Stream]], metrics: Metrics) -> None:
        self._owner = owner
        self._running = running
        self._metrics = metrics

    def take(self, worker: WorkerRef, batch: Iterable[pb.SequenceTokens], now: float) -> None:
        """One step's tokens, of any number of sequences."""
        num_tokens, gaps = 0, dict[float, int]()
        for message in batch:
            attempt = message.attempt
            found = self._running.get(attempt.request_id)
            if found is None:
                continue
            sequence, stream = found
            before, previous = len(sequence.tokens), sequence.last_token_at
            if message.finish or not sequence.follow(worker, attempt.number, message.position, message.tokens, now):
                self._take_run(sequence, stream, worker, message, now)
                continue
            after = len(sequence.tokens)
            num_tokens += after - before
            if previous is not None:
                gap = (now - previous) / (after - before)
                gaps[gap] = gaps.get(gap, 0) + after - before
            if before // PROGRESS_EVERY != after // PROGRESS_EVERY:
                self._owner.post(Progress(now, worker, attempt_from(attempt), after))
            stream.wake()
        if num_tokens:
            self._metrics.step(self._owner.place(worker), num_tokens, gaps)

    def _take_run(self, sequence: Sequence, stream: Stream, worker: WorkerRef, message: pb.SequenceTokens, now: float) -> None:
        """Whatever is not plain: an attempt's first tokens, its last, those out of order, those with log probabilities."""
        attempt = attempt_from(message.attempt)
        try:
            accepted = sequence.accept(worker, attempt, run_from(message))
        except (TokenGap, ValueError) as error:
            report = pb.AttemptFailed(reason=f"{worker.worker_id}: {error}", retriable=True)
            self._owner.attempt_failed(worker, attempt, "gap", report)
            return
        for source, run, first in accepted:
            self._append(sequence, stream, attempt, source, run, first, now)

    def _append(
        self, sequence: Sequence, stream: Stream, attempt: Attempt, worker: WorkerRef, run: TokenRun, first: bool, now: float
    ) -> None:
        if sequence.done:
            return
        before, previous = len(sequence.tokens), sequence.last_token_at
        sequence.append(worker, run, first, now)
        if run.tokens:
            gap = None if previous is None else now - previous
            self._metrics.tokens(self._owner.place(worker), len(run.tokens), gap)
        if first:
            self._owner.post(FirstToken(now, worker, attempt))
        if run.finish is not None:
            sequence.wanted_finish = run.finish
            self._owner.post(Finished(now, worker, attempt))
            if not sequence.done:  # the lifecycle had given this attempt up already
                sequence.wanted_finish = None
                sequence.retract(run)
                return
        elif before // PROGRESS_EVERY != len(sequence.tokens) // PROGRESS_EVERY:
            self._owner.post(Progress(now, worker, attempt, len(sequence.tokens)))
        stream.wake()
