"""A simulated decode (or mixed) worker: `decode_worker.worker.DecodeWorker` in virtual time, with the real receiving end."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import BatonError, TransferRefused
from ..core.kv import Endpoint, KVLayout
from ..core.request import Attempt, SequenceSpec, WorkerRef
from ..kv_transfer import handoff as ho
from ..kv_transfer.transport import Header
from .heap import EventHeap
from .meter import Meter
from .port import RouterPort
from .timeline import Timeline
from .worker import Place, SimulatedWorker

HEAD_ROOM = 1  # blocks reserved beyond the prompt's, as in the service


class DecodeWorker(SimulatedWorker):
    """The receiving end of every handoff, around the engine."""

    def __init__(self, place: Place, heap: EventHeap, port: RouterPort, meter: Meter, timeline: Timeline | None) -> None:
        super().__init__(place, heap, port, meter, timeline)
        setup = place.setup
        layout = KVLayout(1, 1, 1, setup.block_size, "bfloat16")  # only its block size matters: nothing is copied
        endpoint = Endpoint(place.ref, "", "", "", setup.num_blocks, layout)
        self._receiver = ho.Receiver(place.ref, self.blocks, setup.block_size, (endpoint,), place.lease, HEAD_ROOM)

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting + self._receiver.num_waiting

    @property
    def num_tickets(self) -> int:
        return self._receiver.num_tickets

    # ---- commands ------------------------------------------------------------------------------

    def on_submit(self, spec: SequenceSpec, target: WorkerRef | None) -> None:
        self.add(spec)
        self._room_freed()

    def on_reserve(self, spec: SequenceSpec, source: WorkerRef) -> None:
        self._take(ho.ReserveAsked(self.heap.now, spec, source))
        self._room_freed()

    def on_abort(self, attempt: Attempt) -> None:
        self._take(ho.Cancelled(self.heap.now, attempt))
        self.abort(attempt)
        self._room_freed()

    def on_renew(self, attempts: tuple[Attempt, ...]) -> None:
        self._take(ho.LeaseRenewed(self.heap.now, attempts))
        self._room_freed()

    def on_gone(self, gone: WorkerRef) -> None:
        self._take(ho.SourceGone(self.heap.now, gone))
        self._room_freed()

    def on_tick(self) -> None:
        self._take(ho.Tick(self.heap.now))
        self._room_freed()

    # ---- what arrives from prefill workers --------------------------------------------------------

    def check(self, header: Header) -> None:
        """Raises TransferRefused unless the header's ticket is alive."""
        self._receiver.check(header)

    def land(self, header: Header) -> str | None:
        """The bytes of a push are here. Returns why they are refused, if they are."""
        try:
            self._receiver.check(header)
        except TransferRefused as error:
            return str(error)
        self.deliver(self._take, ho.Landed(self.heap.now, header))
        return None

    def on_stopped(self, source: WorkerRef, attempt: Attempt) -> None:
        self._take(ho.SourceStopped(self.heap.now, source, attempt))
        self._room_freed()

    # ---- inside --------------------------------------------------------------------------------

    def may_repeat(self) -> bool:
        # A reservation that waits may find blocks that a step publishes.
        return not (self.setup.prefix_cache and self._receiver.num_waiting)

    def after_step(self) -> None:
        self._room_freed()

    def _room_freed(self) -> None:
        if self._receiver.num_waiting:
            self._take(ho.RoomFreed(self.heap.now))
        if self.scheduler.num_waiting:
            self.device.wake()

    def _take(self, event: ho.ReceiverEvent) -> None:
        actions = self._receiver.handle(event)
        if actions:
            self._perform(actions)

    def _perform(self, actions: Sequence[ho.ReceiverAction]) -> None:
        for action in actions:
            match action:
                case ho.Grant(ticket):
                    self.port.granted(self.ref, ticket)
                case ho.Adopt():
                    self._adopt(action)
                case ho.Fail(attempt, reason, retriable):
                    self.fail(attempt, reason, retriable)

    def _adopt(self, action: ho.Adopt) -> None:
        attempt = action.spec.attempt
        try:
            self.scheduler.adopt(action.spec, action.blocks, action.first_token, self.heap.now)
        except BatonError as error:
            self.blocks.release(action.blocks)
            self.fail(attempt, str(error), retriable=False)
            return
        self.port.adopted(self.ref, attempt)
        self.device.wake()
