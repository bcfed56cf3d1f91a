"""What every worker does, whatever its pool: serve whole sequences and report tokens.

A prefill worker adds the sending end of a handoff to this, a decode worker the receiving end.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence

from ..core.clock import Clock
from ..core.errors import BatonError, InvalidRequest
from ..core.observed import ObservedStep
from ..core.request import Attempt, SequenceSpec
from ..core.step import ComputedEvent, FailedEvent, PreemptedEvent, SequenceEvent, StepPlan, TokenEvent
from ..core.view import WorkerLoad
from ..engine.loop import EngineLoop
from ..proto import worker_pb2 as pb
from .build import Engine
from .messages import attempt_to, tokens_to
from .sessions import Session, Sessions

logger = logging.getLogger("baton.worker")


class WorkerCore:
    """An engine, its loop, and the routers it works for."""

    def __init__(self, engine: Engine, sessions: Sessions, clock: Clock) -> None:
        self.engine = engine
        self.sessions = sessions
        self.clock = clock
        self.loop = EngineLoop(engine.scheduler, engine.executor, engine.times, clock, self.on_events, self.on_step_failed)
        self._without_token: set[Attempt] = set()

    # ---- commands ------------------------------------------------------------------------------

    def add(self, spec: SequenceSpec, session: Session) -> bool:
        """Queue a sequence to be prefilled here. Returns False (and reports the failure) when it can never run."""
        self.sessions.own(spec.attempt, session, len(spec.known_tokens), to_prefill=True)
        try:
            self.engine.scheduler.add(spec, self.clock.now())
        except BatonError as error:
            self.fail(spec.attempt, str(error), retriable=not isinstance(error, InvalidRequest))
            return False
        self._without_token.add(spec.attempt)
        self.prepare(spec)
        self.loop.wake()
        return True

    def prepare(self, spec: SequenceSpec) -> None:
        """A sequence is expected: begin what takes long and can be done beside the steps."""
        if spec.sampling.grammar is not None:
            self.engine.grammars.prepare(spec.sampling.grammar)

    def forget(self, attempt: Attempt) -> None:
        """The attempt has left this worker."""
        self._without_token.discard(attempt)
        self.engine.executor.forget(attempt)
        self.sessions.disown(attempt)

    def abort(self, attempt: Attempt) -> None:
        """Drop the attempt wherever it is; harmless when it is not here."""
        self.engine.scheduler.abort(attempt)
        self.forget(attempt)
        self.loop.wake()

    def fail(self, attempt: Attempt, reason: str, retriable: bool) -> None:
        """Report to the router that the attempt is given up."""
        message = pb.AttemptFailed(attempt=attempt_to(attempt), reason=reason, retriable=retriable)
        self.sessions.send(attempt, pb.WorkerMessage(failed=message))
        self.forget(attempt)

    # ---- what the engine's loop reports ---------------------------------------------------------

    def on_events(self, step: int, events: list[SequenceEvent]) -> None:
        """One message per router and step carries every sequence that gained tokens."""
        batches: defaultdict[Session, list[pb.SequenceTokens]] = defaultdict(list)
        ended: list[Attempt] = []
        preempted: list[Attempt] = []
        failed: list[FailedEvent] = []
        for event in events:
            if isinstance(event, TokenEvent):
                session = self.sessions.owner(event.attempt)
                if session is not None:
                    batches[session].append(self._tokens(event))
                if event.finish is not None:
                    ended.append(event.attempt)
                self.on_tokens(event)
            elif isinstance(event, ComputedEvent):
                self.on_computed(event)
            elif isinstance(event, PreemptedEvent):
                preempted.append(event.attempt)
            elif isinstance(event, FailedEvent):
                failed.append(event)
        for session, sequences in batches.items():
            session.send(pb.WorkerMessage(tokens=pb.TokenBatch(step=step, sequences=sequences)))
        for attempt in preempted:  # after its last tokens, or they would be sampled again
            self.sessions.send(attempt, pb.WorkerMessage(preempted=pb.PreemptedAttempt(attempt=attempt_to(attempt))))
        for failure in failed:
            self.fail(failure.attempt, failure.reason, retriable=False)
        for attempt in ended + preempted:
            self.forget(attempt)

    def on_tokens(self, event: TokenEvent) -> None:
        """For the roles: a sequence gained tokens."""

    def on_computed(self, event: ComputedEvent) -> None:
        """For the roles: a sequence to be handed over has more KV."""

    def on_step_failed(self, plan: StepPlan, error: Exception) -> None:
        """The executor raised: the plan's sequences are retried elsewhere."""
        for row in plan.rows:
            self.fail(row.attempt, f"step {plan.step} failed: {error}", retriable=True)

    def load(self) -> WorkerLoad:
        """The engine's part of a load report."""
        scheduler, blocks, times = self.engine.scheduler, self.engine.blocks, self.loop.times
        return WorkerLoad(
            step=self.loop.step,
            in_step=self.loop.in_step,
            predicted_step=self.loop.predicted_step,
            prefill_rate=times.prefill_rate,
            decode_step=times.decode_step,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            free_blocks=blocks.num_free,
            total_blocks=blocks.num_blocks,
            quarantined_blocks=blocks.num_quarantined,
        )

    def steps(self) -> Sequence[ObservedStep]:
        """What the loop has kept of its steps."""
        return self.loop.log.steps()

    def _tokens(self, event: TokenEvent) -> pb.SequenceTokens:
        if event.attempt not in self._without_token:
            return tokens_to(event, 0.0, 0)
        self._without_token.discard(event.attempt)
        self.sessions.prefilled(event.attempt)
        info = self.engine.scheduler.info(event.attempt)
        now = self.clock.now()
        started = now if info is None or info.first_scheduled is None else info.first_scheduled
        cached = 0 if info is None else info.cached_tokens
        return tokens_to(event, max(0.0, now - started), cached)
