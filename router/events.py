"""What the lifecycle is told and what it asks for: the vocabulary of every routing decision.

Tokens stay out of it: the service keeps the token log, and starts an attempt with the prompt and the
tokens the client already has. Events carry the time; `Arrived` carries the random draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import Attempt, Request, WorkerRef
from ..core.view import Role, WorkerLoad

# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    """A validated request. `draw` in [0, 1) is this request's random draw."""

    now: float
    request: Request
    draw: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client cancelled, disconnected, or its text met a stop string (`done`: end it without an error)."""

    now: float
    request_id: str
    done: bool = False


@dataclass(frozen=True, slots=True)
class Granted:
    """A decode worker reserved blocks; the prefill worker may push. `ticket` is passed on unread."""

    now: float
    worker: WorkerRef
    attempt: Attempt
    ticket: bytes


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token of the attempt reached the router: its prefill is done."""

    now: float
    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Adopted:
    """All KV landed at the decode worker, which runs the sequence from now on."""

    now: float
    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The prefill worker has let go of the attempt's blocks."""

    now: float
    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Progress:
    """The attempt now has `num_output` tokens; sent now and then."""

    now: float
    worker: WorkerRef
    attempt: Attempt
    num_output: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The sequence ended by its own rules (stop token or length)."""

    now: float
    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """A worker gave the attempt up. `retriable`: another attempt may succeed. `reason` is for people."""

    now: float
    worker: WorkerRef
    attempt: Attempt
    reason: str
    retriable: bool = True


@dataclass(frozen=True, slots=True)
class Preempted:
    """The decode worker ran short of blocks and let the sequence go."""

    now: float
    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """A worker is connected and warmed up."""

    now: float
    worker: WorkerRef
    role: Role
    block_size: int
    total_blocks: int


@dataclass(frozen=True, slots=True)
class WorkerReported:
    """A heartbeat's load report."""

    now: float
    worker: WorkerRef
    load: WorkerLoad


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """The worker takes no new work and finishes what it has."""

    now: float
    worker: WorkerRef


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker died, hangs or cannot be reached: treat it as dead from now on."""

    now: float
    worker: WorkerRef
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerConfirmedDead:
    """The process is known to be gone: it cannot write to anybody's blocks any more."""

    now: float
    worker: WorkerRef


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer set by `SetTimer` ran out. Stale ones are ignored by the lifecycle."""

    now: float
    timer: Timer


@dataclass(frozen=True, slots=True)
class Timer:
    """What the time is about.

    deadline  a request's end of patience
    stage     an attempt has been in `stage` for too long
    lease     time to renew tickets
    """

    kind: str
    request_id: str = ""
    attempt: int = 0
    stage: str = ""


Event = (
    Arrived
    | Cancelled
    | Granted
    | FirstToken
    | Adopted
    | HandedOver
    | Progress
    | Finished
    | AttemptFailed
    | Preempted
    | WorkerJoined
    | WorkerReported
    | WorkerDraining
    | WorkerLost
    | WorkerConfirmedDead
    | TimerFired
)

# ---- actions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendReserve:
    """Ask decode worker `worker` to reserve blocks for the attempt, which `source` will prefill. Carries the whole sequence."""

    worker: WorkerRef
    attempt: Attempt
    source: WorkerRef


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Ask prefill worker `worker` to prefill the attempt and hand it over to `target`."""

    worker: WorkerRef
    attempt: Attempt
    target: WorkerRef


@dataclass(frozen=True, slots=True)
class SendRun:
    """Ask `worker` to serve the whole attempt."""

    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SendGrant:
    """Pass a ticket on to the prefill worker."""

    worker: WorkerRef
    attempt: Attempt
    ticket: bytes


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell `worker` to drop the attempt; harmless when it does not have it."""

    worker: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SendRenew:
    """Renew the leases of `attempts` at `worker`."""

    worker: WorkerRef
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class SendGone:
    """Tell `worker` that `gone` is confirmed dead, so that blocks it could still write may leave quarantine."""

    worker: WorkerRef
    gone: WorkerRef


@dataclass(frozen=True, slots=True)
class KillWorker:
    """Ask the controller to end `worker` and to confirm its death."""

    worker: WorkerRef
    reason: str


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Wake the lifecycle with `TimerFired(timer)` at time `at`. Setting an equal timer again replaces it."""

    timer: Timer
    at: float


@dataclass(frozen=True, slots=True)
class Complete:
    """The request is over and leaves the lifecycle: exactly one per Arrived.

    error    None when it ended well (finished, or `Cancelled(done=True)`); else the `code` of an error in `core.errors`
    message  for the client
    retry_after  seconds, with `resource_exhausted`
    """

    request_id: str
    error: str | None = None
    message: str = ""
    retry_after: float = 0.0


Action = SendReserve | SendPrefill | SendRun | SendGrant | SendAbort | SendRenew | SendGone | KillWorker | SetTimer | Complete
