"""The decode worker's end of every handoff: reserve, land, adopt, expire, quarantine.

Pure: events in, actions out; it calls the block allocator and nothing else. It must never give back a block
that a source may still write to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.errors import TransferRefused
from ..core.kv import BlockAllocator, Endpoint
from ..core.request import Attempt, SequenceSpec, WorkerRef
from .ended import Ended
from .handoff_events import (
    Adopt,
    Cancelled,
    Damaged,
    Fail,
    Grant,
    Landed,
    LeaseRenewed,
    ReceiverAction,
    ReceiverEvent,
    ReserveAsked,
    RoomFreed,
    SourceGone,
    SourceStopped,
    Tick,
)
from .ticket import Ticket
from .transport import Header, Note


@dataclass(slots=True)
class _Waiting:
    """A reservation that holds nothing yet."""

    spec: SequenceSpec
    source: WorkerRef
    expires: float


@dataclass(slots=True)
class _Granted:
    """A live ticket. `blocks` is `ticket.blocks` and the head room, one reference each."""

    ticket: Ticket
    spec: SequenceSpec
    blocks: tuple[int, ...]
    expires: float
    landed: set[int] = field(default_factory=set)  # indices into ticket.blocks
    writable: bool = False  # the source asked and was told that it may write

    @property
    def num_missing(self) -> int:
        return len(self.ticket.blocks) - self.ticket.num_held - len(self.landed)


@dataclass(frozen=True, slots=True)
class _Quarantined:
    """Blocks of a dead ticket that its source may still write to."""

    source: WorkerRef
    blocks: tuple[int, ...]


class Receiver:
    """All reservations and tickets of one decode worker.

    head_room  blocks reserved beyond those of the known tokens (fewer when the pool is that small)
    """

    def __init__(
        self,
        worker: WorkerRef,
        blocks: BlockAllocator,
        block_size: int,
        endpoints: tuple[Endpoint, ...],
        lease: float,
        head_room: int,
    ) -> None:
        self._worker = worker
        self._blocks = blocks
        self._block_size = block_size
        self._endpoints = endpoints
        self._lease = lease
        self._head_room = head_room
        self._generation = 0
        self._waiting: dict[Attempt, _Waiting] = {}  # in order of arrival
        self._granted: dict[Attempt, _Granted] = {}
        self._quarantined: dict[Attempt, _Quarantined] = {}
        self._ended = Ended(lease)  # a repeated ReserveAsked of one of them is ignored
        self._short_at: int | None = None  # free blocks when the head of the queue last did not fit

    @property
    def num_waiting(self) -> int:
        """Reservations that hold no blocks yet."""
        return len(self._waiting)

    @property
    def num_tickets(self) -> int:
        """Tickets that are alive."""
        return len(self._granted)

    @property
    def num_quarantined(self) -> int:
        """Dead tickets whose source has neither stopped nor died."""
        return len(self._quarantined)

    @property
    def attempts(self) -> frozenset[Attempt]:
        """Attempts that wait or hold a live ticket."""
        return frozenset(self._waiting) | frozenset(self._granted)

    def check(self, header: Header) -> None:
        """Let `header.source` write the blocks of `header.note`, or raise TransferRefused and let it write nothing.

        Once this has returned, the ticket's blocks are not reused before the source has stopped or is dead.
        """
        entry = self._entry_of(header)
        problem = _problem_with(header.note, entry)
        if problem:
            raise TransferRefused(f"push for {header.attempt} refused: {problem}")
        entry.writable = True

    def handle(self, event: ReceiverEvent) -> list[ReceiverAction]:
        """Take one event in; return what is to be done, in order."""
        self._ended.now = event.now
        actions = self._take(event)
        if self._waiting:
            actions += self._grant_waiting(event.now, force=isinstance(event, Tick))
        return actions

    # ---- events ----------------------------------------------------------------------------------

    def _take(self, event: ReceiverEvent) -> list[ReceiverAction]:
        match event:
            case ReserveAsked():
                return self._on_reserve(event)
            case RoomFreed():
                return []
            case Landed(_, header):
                return self._on_landed(header)
            case Damaged(_, header, reason):
                return self._on_damaged(header, reason)
            case LeaseRenewed(now, attempts):
                return self._on_renewed(now, attempts)
            case Cancelled(_, attempt):
                self._ended.add(attempt)
                self._end(attempt)
                return []
            case SourceStopped(_, source, attempt):
                return self._on_stopped(source, attempt)
            case SourceGone(_, worker):
                return self._on_gone(worker)
            case Tick(now):
                return self._on_tick(now)

    def _on_reserve(self, event: ReserveAsked) -> list[ReceiverAction]:
        attempt = event.spec.attempt
        if attempt in self._ended or attempt in self._waiting or attempt in self._granted or attempt in self._quarantined:
            return []
        num_tokens = len(event.spec.known_tokens)
        need, total = self._num_blocks_for(num_tokens), self._endpoints[0].num_blocks
        if need > total or need == 0:
            self._ended.add(attempt)
            reason = f"KV of {num_tokens} tokens needs {need} blocks, worker {self._worker} has {total}"
            return [Fail(attempt, reason, retriable=False)]
        self._waiting[attempt] = _Waiting(event.spec, event.source, event.now + self._lease)
        if len(self._waiting) == 1:
            self._short_at = None
        return []  # granted at once by `handle` when it is at the head and fits

    def _on_landed(self, header: Header) -> list[ReceiverAction]:
        try:
            entry = self._entry_of(header)
        except TransferRefused:
            return []  # the ticket died between the check and the landing: its blocks are in quarantine
        problem = _problem_with(header.note, entry)
        if problem:
            self._end(header.attempt)
            return [Fail(header.attempt, f"what landed for {header.attempt} is wrong: {problem}", retriable=True)]
        entry.writable = True
        note = header.note
        entry.landed.update(range(note.first_block, note.first_block + note.num_blocks))
        if not note.last:
            return []
        del self._granted[header.attempt]
        self._ended.add(header.attempt)
        return [Adopt(entry.spec, entry.blocks, note.first_token, entry.ticket.num_held)]

    def _on_damaged(self, header: Header, reason: str) -> list[ReceiverAction]:
        try:
            self._entry_of(header)
        except TransferRefused:
            return []
        self._end(header.attempt)
        return [Fail(header.attempt, f"KV for {header.attempt} from {header.source} arrived damaged: {reason}", retriable=True)]

    def _on_renewed(self, now: float, attempts: tuple[Attempt, ...]) -> list[ReceiverAction]:
        for attempt in attempts:
            entry = self._granted.get(attempt) or self._waiting.get(attempt)
            if entry is not None:
                entry.expires = now + self._lease
        return []

    def _on_stopped(self, source: WorkerRef, attempt: Attempt) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        entry = self._granted.get(attempt)
        if entry is not None and entry.ticket.source == source:
            self._end(attempt)
            actions.append(Fail(attempt, f"prefill worker {source} gave {attempt} up", retriable=True))
        held = self._quarantined.get(attempt)
        if held is not None and held.source == source:
            self._end_quarantine(attempt)
        return actions

    def _on_gone(self, worker: WorkerRef) -> list[ReceiverAction]:
        sources = {attempt: waiting.source for attempt, waiting in self._waiting.items()}
        sources |= {attempt: entry.ticket.source for attempt, entry in self._granted.items()}
        lost = [attempt for attempt, source in sources.items() if source == worker]
        for attempt in lost:
            self._end(attempt)
        for attempt in [a for a, held in self._quarantined.items() if held.source == worker]:
            self._end_quarantine(attempt)
        return [Fail(attempt, f"prefill worker {worker} died", retriable=True) for attempt in lost]

    def _on_tick(self, now: float) -> list[ReceiverAction]:
        self._ended.forget_old()
        late_waiting = [a for a, waiting in self._waiting.items() if now >= waiting.expires]
        late_granted = [a for a, entry in self._granted.items() if now >= entry.expires]
        for attempt in late_waiting + late_granted:
            self._end(attempt)
        reason = f"the lease of {self._lease:g} s ran out at {self._worker}"
        return [Fail(attempt, reason, retriable=True) for attempt in late_waiting + late_granted]

    # ---- reservations ----------------------------------------------------------------------------

    def _grant_waiting(self, now: float, force: bool) -> list[ReceiverAction]:
        """Grant from the head of the queue for as long as it fits: nobody overtakes a long prompt."""
        actions: list[ReceiverAction] = []
        if not force and self._short_at is not None and self._short_at == self._blocks.num_free:
            return actions  # nothing has changed since the head did not fit
        self._short_at = None
        while self._waiting:
            attempt, waiting = next(iter(self._waiting.items()))
            ticket = self._reserve(waiting, now)
            if ticket is None:
                self._short_at = self._blocks.num_free
                break
            del self._waiting[attempt]
            actions.append(Grant(ticket))
        return actions

    def _reserve(self, waiting: _Waiting, now: float) -> Ticket | None:
        tokens = waiting.spec.known_tokens
        num_known = self._num_blocks_for(len(tokens))
        num_wanted = min(num_known + self._head_room, self._endpoints[0].num_blocks)
        held = self._blocks.lookup(tokens)
        fresh = self._blocks.allocate(num_wanted - len(held))
        if fresh is None:
            self._blocks.release(held)
            return None
        blocks = held + fresh
        self._generation += 1
        ticket = Ticket(
            attempt=waiting.spec.attempt,
            source=waiting.source,
            target=self._worker,
            blocks=blocks[:num_known],
            num_held=len(held),
            num_tokens=len(tokens),
            generation=self._generation,
            lease=self._lease,
            endpoints=self._endpoints,
        )
        self._granted[waiting.spec.attempt] = _Granted(ticket, waiting.spec, blocks, now + self._lease)
        return ticket

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ---- ends ------------------------------------------------------------------------------------

    def _entry_of(self, header: Header) -> _Granted:
        """The live ticket that `header` names in every field. Raises TransferRefused when there is none."""
        if header.target != self._worker:
            raise TransferRefused(f"push for {header.attempt} is meant for {header.target}, this is {self._worker}")
        entry = self._granted.get(header.attempt)
        if entry is None:
            raise TransferRefused(f"no live ticket for {header.attempt} at {self._worker}: expired, cancelled or complete")
        ticket = entry.ticket
        if header.generation != ticket.generation or header.source != ticket.source:
            raise TransferRefused(
                f"push for {header.attempt} from {header.source} names generation {header.generation}; "
                f"the live ticket is generation {ticket.generation} for {ticket.source}"
            )
        return entry

    def _end(self, attempt: Attempt) -> None:
        """End an attempt that is not to be adopted; blocks that its source may write to go to quarantine."""
        waiting = self._waiting.pop(attempt, None)
        entry = self._granted.pop(attempt, None)
        if waiting is not None:
            self._short_at = None  # another reservation may be at the head now
        if waiting is not None or entry is not None:
            self._ended.add(attempt)
        if entry is None:
            return
        if not entry.writable:
            self._blocks.release(entry.blocks)
            return
        num_held, num_known = entry.ticket.num_held, len(entry.ticket.blocks)
        exposed = entry.blocks[num_held:num_known]
        self._blocks.release(entry.blocks[:num_held] + entry.blocks[num_known:])
        if exposed:
            self._blocks.quarantine(exposed)
            self._quarantined[attempt] = _Quarantined(entry.ticket.source, exposed)

    def _end_quarantine(self, attempt: Attempt) -> None:
        self._blocks.end_quarantine(self._quarantined.pop(attempt).blocks)


def _problem_with(note: Note, entry: _Granted) -> str | None:
    """What is wrong with a note under this ticket, or None."""
    ticket, end = entry.ticket, note.first_block + note.num_blocks
    if note.num_blocks < 0 or note.first_block < ticket.num_held or end > len(ticket.blocks):
        return f"blocks [{note.first_block}, {end}) are not within [{ticket.num_held}, {len(ticket.blocks)}) of the ticket"
    if not note.last:
        return None
    if note.first_token < 0:
        return "the last push carries no first token"
    missing = entry.num_missing - len(set(range(note.first_block, end)) - entry.landed)
    return f"{missing} blocks are missing although this is the last push" if missing else None
