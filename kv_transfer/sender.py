"""The prefill worker's end of every handoff: pin, push chunk by chunk, hand over or give up.

Pure: events in, actions out. It must never let go of blocks that a push is reading, and never push again
under a ticket for which it has promised to stop.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.request import Attempt, WorkerRef
from .ended import Ended
from .handoff_events import (
    Cancelled,
    Computed,
    Fail,
    FirstToken,
    Granted,
    HandedOver,
    LeaseRenewed,
    Opened,
    Push,
    PushDone,
    PushFailed,
    SenderAction,
    SenderEvent,
    SendStop,
    TargetGone,
    Tick,
    Unpin,
)
from .ticket import Ticket
from .transport import Note


@dataclass(slots=True)
class _Outgoing:
    """One opened attempt."""

    attempt: Attempt
    target: WorkerRef
    num_tokens: int
    expires: float
    ticket: Ticket | None = None
    num_computed: int = 0
    blocks: tuple[int, ...] = ()
    computed: bool = False  # KV of every known token is there
    first_token: int | None = None
    asked: bool = False  # the receiver has been asked whether the ticket lives
    next_block: int = 0  # first block of the ticket that has not been pushed
    in_flight: Note | None = None
    ending: bool = False  # given up; only waits for the push in flight
    promise: bool = True  # whether the receiver is to be told that writing has stopped


class Sender:
    """All attempts that one prefill worker is to hand over."""

    def __init__(self, worker: WorkerRef, lease: float) -> None:
        self._worker = worker
        self._lease = lease
        self._outgoing: dict[Attempt, _Outgoing] = {}
        self._ended = Ended(lease)  # one of them is not opened again

    @property
    def num_open(self) -> int:
        """Attempts whose blocks are pinned, those that only wait for their last push among them."""
        return len(self._outgoing)

    @property
    def attempts(self) -> frozenset[Attempt]:
        """Attempts whose blocks are pinned."""
        return frozenset(self._outgoing)

    def is_open(self, attempt: Attempt) -> bool:
        """Whether the attempt is to be handed over and has not been given up."""
        entry = self._outgoing.get(attempt)
        return entry is not None and not entry.ending

    def handle(self, event: SenderEvent) -> list[SenderAction]:
        """Take one event in; return what is to be done, in order."""
        self._ended.now = event.now
        match event:
            case Opened():
                return self._on_opened(event)
            case Computed():
                return self._on_computed(event)
            case FirstToken(_, attempt, token):
                return self._on_first_token(attempt, token)
            case Granted(_, ticket):
                return self._on_granted(ticket)
            case PushDone():
                return self._on_push_done(event)
            case PushFailed():
                return self._on_push_failed(event)
            case LeaseRenewed(now, attempts):
                for attempt in attempts:
                    if attempt in self._outgoing:
                        self._outgoing[attempt].expires = now + self._lease
                return []
            case Cancelled(_, attempt):
                return self._give_up(attempt)
            case TargetGone(_, worker):
                return self._on_target_gone(worker)
            case Tick(now):
                return self._on_tick(now)

    # ---- events ----------------------------------------------------------------------------------

    def _on_opened(self, event: Opened) -> list[SenderAction]:
        attempt = event.attempt
        if attempt in self._outgoing:
            return []
        if attempt in self._ended:  # its ticket came first and was answered with a promise
            return [Fail(attempt, f"{attempt} has already ended at {self._worker}", retriable=True), Unpin(attempt)]
        self._outgoing[attempt] = _Outgoing(attempt, event.target, event.num_tokens, event.now + self._lease)
        return []

    def _on_computed(self, event: Computed) -> list[SenderAction]:
        entry = self._outgoing.get(event.attempt)
        if entry is None:
            return []
        entry.num_computed, entry.blocks, entry.computed = event.num_tokens, event.blocks, event.last
        return self._advance(entry)

    def _on_first_token(self, attempt: Attempt, token: int) -> list[SenderAction]:
        entry = self._outgoing.get(attempt)
        if entry is None:
            return []
        entry.first_token = token
        return self._advance(entry)

    def _on_granted(self, ticket: Ticket) -> list[SenderAction]:
        attempt = ticket.attempt
        entry = self._outgoing.get(attempt)
        if ticket.source != self._worker:
            if entry is None:
                return []
            return self._give_up(attempt, f"the ticket for {attempt} is for {ticket.source}, this is {self._worker}")
        if entry is None:
            self._ended.add(attempt)
            return [SendStop(attempt, ticket)]
        if entry.ticket is not None or entry.ending:
            if entry.ticket is None:
                entry.ticket = ticket  # nothing is pushed under it any more; the promise follows with the end
            return []
        if ticket.target != entry.target or ticket.num_tokens != entry.num_tokens:
            entry.ticket = ticket
            wanted = f"{entry.num_tokens} tokens to {entry.target}"
            return self._give_up(attempt, f"the ticket is for {ticket.num_tokens} tokens to {ticket.target}, not {wanted}")
        entry.ticket = ticket
        entry.next_block = ticket.num_held
        return self._advance(entry)

    def _on_push_done(self, event: PushDone) -> list[SenderAction]:
        entry = self._outgoing.get(event.attempt)
        note = entry.in_flight if entry is not None else None
        if entry is None or note is None or (note.first_block, note.num_blocks) != (event.first_block, event.num_blocks):
            return []
        entry.in_flight = None
        if note.last:
            self._forget(entry)
            handed_over: list[SenderAction] = [] if entry.ending else [HandedOver(entry.attempt)]
            return [Unpin(entry.attempt), *handed_over]
        return self._finish(entry) if entry.ending else self._advance(entry)

    def _on_push_failed(self, event: PushFailed) -> list[SenderAction]:
        entry = self._outgoing.get(event.attempt)
        if entry is None or entry.in_flight is None:
            return []
        entry.in_flight = None
        if entry.ending:
            return self._finish(entry)
        return self._give_up(event.attempt, event.reason, event.retriable)

    def _on_target_gone(self, worker: WorkerRef) -> list[SenderAction]:
        actions: list[SenderAction] = []
        for entry in [e for e in self._outgoing.values() if e.target == worker]:
            entry.promise = False
            actions += self._give_up(entry.attempt, f"decode worker {worker} died")
        return actions

    def _on_tick(self, now: float) -> list[SenderAction]:
        self._ended.forget_old()
        actions: list[SenderAction] = []
        for entry in [e for e in self._outgoing.values() if now >= e.expires]:
            actions += self._give_up(entry.attempt, f"the lease of {self._lease:g} s ran out at {self._worker}")
        return actions

    # ---- pushing ---------------------------------------------------------------------------------

    def _advance(self, entry: _Outgoing) -> list[SenderAction]:
        """Start the next push if there is one to start."""
        ticket = entry.ticket
        if ticket is None or entry.in_flight is not None or entry.ending:
            return []
        note = self._next_note(entry, ticket)
        if note is None:
            return []
        entry.in_flight = note
        entry.asked = True
        entry.next_block = note.first_block + note.num_blocks
        return [Push(ticket, entry.blocks, note)]

    @staticmethod
    def _next_note(entry: _Outgoing, ticket: Ticket) -> Note | None:
        first = entry.next_block
        if entry.computed:
            if entry.first_token is None:
                return None  # it comes with the same step: one push instead of two
            return Note(first, len(ticket.blocks) - first, last=True, first_token=entry.first_token)
        end = entry.num_computed // ticket.endpoints[0].layout.block_size
        if end > first:
            return Note(first, end - first)
        # Asking early whether the ticket lives hides a round trip behind the prefill.
        return None if entry.asked else Note(first, 0)

    # ---- ends ------------------------------------------------------------------------------------

    def _give_up(self, attempt: Attempt, reason: str | None = None, retriable: bool = True) -> list[SenderAction]:
        """End an attempt, with a Fail when there is a reason; what a push is reading stays pinned until it ends."""
        entry = self._outgoing.get(attempt)
        if entry is None or entry.ending:
            return []
        entry.ending = True
        failed: list[SenderAction] = [] if reason is None else [Fail(attempt, reason, retriable)]
        return failed if entry.in_flight is not None else failed + self._finish(entry)

    def _finish(self, entry: _Outgoing) -> list[SenderAction]:
        self._forget(entry)
        unpin: list[SenderAction] = [Unpin(entry.attempt)]
        if entry.ticket is None or not entry.promise:
            return unpin
        return [*unpin, SendStop(entry.attempt, entry.ticket)]

    def _forget(self, entry: _Outgoing) -> None:
        del self._outgoing[entry.attempt]
        self._ended.add(entry.attempt)
