"""A simulated prefill worker: `prefill_worker.worker.PrefillWorker` in virtual time, with the real sending end of a handoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..core.request import Attempt, SequenceSpec, WorkerRef
from ..core.step import ComputedEvent, TokenEvent
from ..kv_transfer import handoff as ho
from ..kv_transfer.ticket import Ticket
from .heap import EventHeap
from .meter import Meter
from .port import RouterPort
from .timeline import Timeline
from .worker import Place, SimulatedWorker


class Carrier(Protocol):
    """What moves KV between workers, and tells the sender how it ended."""

    def push(self, source: PrefillWorker, action: ho.Push) -> None: ...

    def stop(self, source: PrefillWorker, attempt: Attempt, ticket: Ticket) -> None: ...


class PrefillWorker(SimulatedWorker):
    """The sending end of every handoff, around the engine."""

    def __init__(
        self, place: Place, heap: EventHeap, port: RouterPort, meter: Meter, timeline: Timeline | None, carrier: Carrier
    ) -> None:
        super().__init__(place, heap, port, meter, timeline)
        self._carrier = carrier
        self._sender = ho.Sender(place.ref, place.lease)

    @property
    def num_tickets(self) -> int:
        return self._sender.num_open

    # ---- commands ------------------------------------------------------------------------------

    def on_submit(self, spec: SequenceSpec, target: WorkerRef | None) -> None:
        if self.add(spec) and target is not None:
            self._take(ho.Opened(self.heap.now, spec.attempt, target, len(spec.known_tokens)))

    def on_grant(self, ticket: Ticket) -> None:
        self._take(ho.Granted(self.heap.now, ticket))

    def on_abort(self, attempt: Attempt) -> None:
        self._take(ho.Cancelled(self.heap.now, attempt))
        self.abort(attempt)

    def on_renew(self, attempts: tuple[Attempt, ...]) -> None:
        self._take(ho.LeaseRenewed(self.heap.now, attempts))

    def on_gone(self, gone: WorkerRef) -> None:
        self._take(ho.TargetGone(self.heap.now, gone))

    def on_tick(self) -> None:
        self._take(ho.Tick(self.heap.now))

    # ---- the engine's events -------------------------------------------------------------------

    def on_computed(self, event: ComputedEvent) -> None:
        self._take(ho.Computed(self.heap.now, event.attempt, event.num_tokens, event.blocks, event.last))

    def on_tokens(self, event: TokenEvent) -> None:
        if event.finish is not None:  # it ended with its first token: nothing to hand over
            self._take(ho.Cancelled(self.heap.now, event.attempt))
        elif self._sender.is_open(event.attempt):
            self._take(ho.FirstToken(self.heap.now, event.attempt, event.tokens[0]))

    # ---- pushes --------------------------------------------------------------------------------

    def on_push_ended(self, action: ho.Push, problem: str | None) -> None:
        """The push was acknowledged, or failed in a way that another attempt may mend."""
        attempt, note = action.ticket.attempt, action.note
        self.blocks.release(action.source_blocks)
        self.device.wake()  # somebody may wait for these blocks
        if problem is None:
            self._take(ho.PushDone(self.heap.now, attempt, note.first_block, note.num_blocks))
        else:
            self._take(ho.PushFailed(self.heap.now, attempt, problem, retriable=True))

    def _take(self, event: ho.SenderEvent) -> None:
        actions = self._sender.handle(event)
        if actions:
            self._perform(actions)

    def _perform(self, actions: Sequence[ho.SenderAction]) -> None:
        for action in actions:
            match action:
                case ho.Push(source_blocks=blocks):
                    # A reference of the push's own: the blocks stay what they are, whatever happens to the sequence.
                    self.blocks.retain(blocks)
                    self._carrier.push(self, action)
                case ho.Unpin(attempt):
                    self.scheduler.release(attempt)
                    self.device.wake()
                case ho.HandedOver(attempt):
                    self.port.handed_over(self.ref, attempt)
                    self.forget(attempt)
                case ho.Fail(attempt, reason, retriable):
                    self.fail(attempt, reason, retriable)
                    self.scheduler.abort(attempt)
                case ho.SendStop(attempt, ticket):
                    self._carrier.stop(self, attempt, ticket)
