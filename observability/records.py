"""What is measured of a finished request: plain numbers, from which metrics and log lines are made."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Place:
    """The labels that every per-worker series carries."""

    pool: str
    worker: str


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Where the time of one sequence went, in seconds; None for a stage that it never reached.

    ttft          arrival to first token at the router; equals queue + prefill
    handoff       first token to adoption at the decode worker (0 when nothing was handed over)
    first_decode  from there to the second token
    """

    ttft: float | None = None
    queue: float | None = None
    prefill: float | None = None
    handoff: float | None = None
    first_decode: float | None = None
    tpot: float | None = None
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class SequenceRecord:
    """One finished sequence. `first` and `rest` are the workers that gave the first token and the others."""

    stages: StageTimes
    output_tokens: int
    cached_tokens: int
    attempts: int
    finish: str
    first: Place | None = None
    rest: Place | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One finished request. `outcome` is `ok` or the code of an error in `core.errors`."""

    request_id: str
    client_id: str
    tenant: str
    outcome: str
    message: str
    prompt_tokens: int
    sequences: tuple[SequenceRecord, ...]
    retries: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker at the moment of a scrape. `heartbeat_age` is None before the first heartbeat."""

    place: Place
    up: bool
    assigned: int
    waiting: int
    running: int
    free_blocks: int
    total_blocks: int
    quarantined_blocks: int
    tickets: int
    step: int
    heartbeat_age: float | None
