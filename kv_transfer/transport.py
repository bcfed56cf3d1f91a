"""What moves KV bytes between workers, and what it asks of the worker that receives them.

A transport knows nothing of requests: it moves byte runs between two pools under a ticket, and reports
completion. The receiver's side is passive: the worker's peer server checks every frame with a `Receiver`
before a byte is accepted, and answers once the bytes lie in the pool and their checksums match.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.kv import Endpoint
from ..core.request import Attempt, WorkerRef
from .ticket import Ticket


@dataclass(frozen=True, slots=True)
class Copy:
    """One contiguous run: `num_bytes` bytes from `source_offset` of the source pool to `target_offset` of the target pool.

    source_rank and target_rank say which rank's pool at either end.
    """

    source_offset: int
    target_offset: int
    num_bytes: int
    source_rank: int = 0
    target_rank: int = 0


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one push cost. `seconds` is wall time to the acknowledgement, `copy_seconds` the part that moved bytes."""

    num_bytes: int
    seconds: float
    copy_seconds: float
    transport: str


@dataclass(frozen=True, slots=True)
class Note:
    """What travels with a push besides the bytes.

    first_block, num_blocks  which of the ticket's blocks this push fills (index into `ticket.blocks`)
    last                     the final push of the ticket: everything has landed after it
    first_token              the token sampled by the prefill worker (with `last`); -1 otherwise
    """

    first_block: int
    num_blocks: int
    last: bool = False
    first_token: int = -1


@dataclass(frozen=True, slots=True)
class Header:
    """How a push names its ticket on the wire; the receiver compares every field."""

    attempt: Attempt
    source: WorkerRef
    target: WorkerRef
    generation: int
    note: Note


class Sink(Protocol):
    """The receiving worker, as a transport's peer server sees it. Called on the event loop; must not block."""

    def check(self, header: Header) -> None:
        """Raise TransferRefused unless the header's ticket is alive and its blocks are those of the ticket."""
        ...

    def landed(self, header: Header) -> None:
        """The bytes of this push are in the pool and verified. Raises TransferRefused as `check` does."""
        ...

    def damaged(self, header: Header, reason: str) -> None:
        """The bytes of this push did not match their checksum; the attempt cannot be adopted."""
        ...

    def stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        """`source` promises never to write under this attempt's ticket again."""
        ...


class Transport(Protocol):
    """The sending side. One object serves all peers of a worker; one peer's failure never stalls another."""

    @property
    def name(self) -> str: ...

    def reaches(self, endpoint: Endpoint) -> bool:
        """Whether this transport can reach that endpoint (same host for shared memory, for example)."""
        ...

    async def push(self, copies: Sequence[Copy], ticket: Ticket, note: Note) -> TransferStats:
        """Move the runs and return when the receiver has verified and accepted them.

        Raises TransferRefused, TransferDamaged or PeerLost. Nothing of this push is
        written any more once it has returned or raised.
        """
        ...

    async def stop(self, ticket_source: WorkerRef, attempt: Attempt, to: Endpoint) -> None:
        """Tell the receiver that nothing will be written under this attempt's ticket again. Best effort, never raises."""
        ...

    async def close(self) -> None: ...
