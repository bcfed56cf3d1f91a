"""Where one request stands: its attempt, the workers that hold something of it, and what they have said so far.

The two workers of a handoff speak over different streams, so their messages come in any order. Therefore
each message sets one flag here, and the stage is read off the flags.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ..core.request import Attempt, Request, WorkerRef
from .worker_table import Share


class Stage(StrEnum):
    """pending   no live worker can take it
    retry     waits a moment before its next attempt
    prefill   until the first token
    grant     has its first token and waits for room at the decode worker: not an error, however long
    handover  has room and waits until all KV has landed
    decode    the rest
    """

    PENDING = "pending"
    RETRY = "retry"
    PREFILL = "prefill"
    GRANT = "grant"
    HANDOVER = "handover"
    DECODE = "decode"


@dataclass(slots=True, eq=False)
class Flight:
    """One request from arrival to its end.

    draw        the random draw it arrived with
    deadline    when it is given up
    attempt     the attempt in flight, or the last one; number 0 before the first
    num_output  tokens the client has, as far as the lifecycle was told
    base_output num_output when the attempt began
    failures    failed attempts; `avoid` holds the workers that were to blame
    source      the prefill worker's share while it holds something of a split attempt
    target      the share of the worker that decodes (or serves the whole attempt)
    since       when the stage began, or when its wait was last explained
    mark        num_output at `since`
    patience    how often a late handover was excused
    """

    request: Request
    draw: float
    deadline: float
    attempt: Attempt
    num_output: int = 0
    base_output: int = 0
    failures: int = 0
    avoid: list[WorkerRef] = field(default_factory=list)
    source: Share | None = None
    target: Share | None = None
    split: bool = False
    first_token: bool = False
    granted: bool = False
    adopted: bool = False
    handed_over: bool = False
    stage: Stage = Stage.PENDING
    since: float = 0.0
    mark: int = 0
    patience: int = 0

    @property
    def known_tokens(self) -> int:
        """Tokens that the next attempt would have to prefill."""
        return self.request.num_prompt_tokens + self.num_output

    def next_attempt(self) -> Attempt:
        """Start a new attempt: nothing has been said of it yet."""
        self.attempt = Attempt(self.request.id, self.attempt.number + 1)
        self.base_output = self.num_output
        self.first_token = self.granted = self.adopted = self.handed_over = False
        self.patience = 0
        return self.attempt

    def is_source(self, worker: WorkerRef) -> bool:
        """Whether `worker` prefills the split attempt in flight and has not let go of it."""
        return self.source is not None and self.source.worker.ref == worker

    def is_target(self, worker: WorkerRef) -> bool:
        """Whether `worker` decodes (or serves) the attempt in flight."""
        return self.target is not None and self.target.worker.ref == worker

    def is_on(self, worker: WorkerRef) -> bool:
        return self.is_target(worker) or self.is_source(worker)

    def survives_source(self) -> bool:
        """Whether nothing more is needed of the prefill worker: the KV has landed and the client has the first token."""
        return self.adopted and self.first_token

    def current_stage(self) -> Stage:
        """The stage of an attempt in flight, by what its workers have said."""
        if not self.split:
            return Stage.DECODE if self.first_token else Stage.PREFILL
        if self.adopted or self.handed_over:
            return Stage.DECODE if self.adopted and self.first_token else Stage.HANDOVER
        if not self.first_token:
            return Stage.PREFILL
        return Stage.HANDOVER if self.granted else Stage.GRANT


@dataclass(frozen=True, slots=True)
class FlightSnapshot:
    """What tests see of a flight."""

    attempt: Attempt
    stage: Stage
    source: WorkerRef | None
    target: WorkerRef | None
    failures: int


def snapshot_of(flight: Flight) -> FlightSnapshot:
    return FlightSnapshot(
        attempt=flight.attempt,
        stage=flight.stage,
        source=flight.source.worker.ref if flight.source else None,
        target=flight.target.worker.ref if flight.target else None,
        failures=flight.failures,
    )
