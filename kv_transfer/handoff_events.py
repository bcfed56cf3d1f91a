"""What the two ends of a handoff are told and what they ask for.

Events carry the time of the worker's clock (`now`, seconds). Events about attempts that an end does not know
are harmless. Must never import anything that does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import Attempt, SequenceSpec, WorkerRef
from .ticket import Ticket
from .transport import Header, Note

# ---- events of both ends --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """The router still wants these attempts: each lives for another lease from now on."""

    now: float
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The attempt is wanted no more: it ends without a `Fail`."""

    now: float
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Tick:
    """The reaper's turn, a few times per lease: what has outlived its lease ends."""

    now: float


# ---- events of the receiver (decode worker) -------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReserveAsked:
    """Reserve blocks for the KV of `spec.known_tokens`, which `source` will prefill."""

    now: float
    spec: SequenceSpec
    source: WorkerRef


@dataclass(frozen=True, slots=True)
class RoomFreed:
    """Blocks may have become free: reservations that wait may be granted."""

    now: float


@dataclass(frozen=True, slots=True)
class Landed:
    """The bytes of one push lie in the pool and are verified. `Receiver.check(header)` did not object."""

    now: float
    header: Header


@dataclass(frozen=True, slots=True)
class Damaged:
    """The bytes of one push did not match their checksum."""

    now: float
    header: Header
    reason: str


@dataclass(frozen=True, slots=True)
class SourceStopped:
    """`source` promised never to write under this attempt's ticket (again)."""

    now: float
    source: WorkerRef
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SourceGone:
    """The process of `worker` is known to be dead: it cannot write any more."""

    now: float
    worker: WorkerRef


ReceiverEvent = ReserveAsked | RoomFreed | Landed | Damaged | LeaseRenewed | Cancelled | SourceStopped | SourceGone | Tick

# ---- events of the sender (prefill worker) --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """The scheduler here has taken a `hand_over` sequence of `num_tokens` known tokens, bound for `target`."""

    now: float
    attempt: Attempt
    target: WorkerRef
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Computed:
    """KV of the first `num_tokens` tokens lies in `blocks` (the sequence's block table from position 0)."""

    now: float
    attempt: Attempt
    num_tokens: int
    blocks: tuple[int, ...]
    last: bool


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The first token was sampled. Comes with the last `Computed`, before or after it."""

    now: float
    attempt: Attempt
    token: int


@dataclass(frozen=True, slots=True)
class Granted:
    """The decode worker's ticket arrived, before, between or after the `Computed` events."""

    now: float
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class PushDone:
    """The push of these blocks was acknowledged."""

    now: float
    attempt: Attempt
    first_block: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The push in flight raised. Nothing of it is written any more."""

    now: float
    attempt: Attempt
    reason: str
    retriable: bool


@dataclass(frozen=True, slots=True)
class TargetGone:
    """The process of `worker` is known to be dead."""

    now: float
    worker: WorkerRef


SenderEvent = Opened | Computed | FirstToken | Granted | PushDone | PushFailed | LeaseRenewed | Cancelled | TargetGone | Tick

# ---- actions --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Grant:
    """Receiver: send this ticket to the router, which passes it on to the source."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Adopt:
    """Receiver: everything has landed; run the sequence.

    blocks    the sequence's block table, head room included; one reference of each passes to the taker
    num_held  leading blocks that were a prefix hit here
    """

    spec: SequenceSpec
    blocks: tuple[int, ...]
    first_token: int
    num_held: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Both ends: tell the router that the attempt is given up here. At most once per attempt and end."""

    attempt: Attempt
    reason: str
    retriable: bool


@dataclass(frozen=True, slots=True)
class Push:
    """Sender: push as `note` says and report `PushDone` or `PushFailed`. One per attempt is in flight.

    source_blocks  the sequence's block table here, from position 0, covering at least the pushed tokens;
                   `note` counts in blocks of the ticket. A note with no blocks moves no bytes: it asks the
                   receiver whether the ticket lives, or (`last`) completes a prompt that was held already
    """

    ticket: Ticket
    source_blocks: tuple[int, ...]
    note: Note


@dataclass(frozen=True, slots=True)
class Unpin:
    """Sender: the blocks here may be freed. Exactly once per opened attempt, never with a push in flight."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class HandedOver:
    """Sender: the receiver has acknowledged all of it; follows `Unpin`."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SendStop:
    """Sender: promise the receiver that nothing will be written under this ticket any more."""

    attempt: Attempt
    ticket: Ticket


ReceiverAction = Grant | Adopt | Fail
SenderAction = Push | Unpin | HandedOver | Fail | SendStop
