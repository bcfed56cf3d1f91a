"""KV on its way between simulated workers: pushes as transfers over the network, acknowledged as the real transports do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import TransferRefused
from ..core.request import Attempt, WorkerRef
from ..kv_transfer import handoff as ho
from ..kv_transfer.ticket import Ticket
from ..kv_transfer.transport import Header
from .decode import DecodeWorker
from .heap import EventHeap
from .network import Network
from .prefill import PrefillWorker
from .setup import NetworkSetup


@dataclass(frozen=True, slots=True)
class _Push:
    source: PrefillWorker
    target: DecodeWorker
    header: Header
    action: ho.Push


class Transfers:
    """`find` gives the live decode worker of a reference."""

    def __init__(self, heap: EventHeap, setup: NetworkSetup, find: Callable[[WorkerRef], DecodeWorker | None]) -> None:
        self.network = Network(setup)
        self._heap = heap
        self._setup = setup
        self._find = find
        self._under_way: dict[int, _Push] = {}
        self._num_started = 0
        self._next_look = math.inf

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def push(self, source: PrefillWorker, action: ho.Push) -> None:
        ticket, note, now = action.ticket, action.note, self._heap.now
        target = self._find(ticket.target)
        if target is None:
            self._answer(source, action, f"decode worker {ticket.target} cannot be reached")
            return
        header = Header(ticket.attempt, source.ref, ticket.target, ticket.generation, note)
        try:
            target.check(header)
        except TransferRefused as error:
            self._answer(source, action, str(error))
            return
        self._num_started += 1
        self._under_way[self._num_started] = _Push(source, target, header, action)
        num_bytes = num_tokens(ticket, note.first_block, note.num_blocks) * self._setup.kv_bytes_per_token
        if num_bytes:
            self.network.start(now, self._num_started, source.node, target.node, num_bytes)
            self._look_later()
        else:
            self._heap.push(now + self._setup.latency, self._arrived, self._num_started)

    def stop(self, source: PrefillWorker, attempt: Attempt, ticket: Ticket) -> None:
        target = self._find(ticket.target)
        if target is not None:
            self._heap.push(self._heap.now + self._setup.latency, target.deliver, target.on_stopped, source.ref, attempt)

    def worker_died(self, ref: WorkerRef) -> None:
        """Whatever it sends or receives breaks off."""
        broken = [number for number, push in self._under_way.items() if ref in (push.source.ref, push.target.ref)]
        for number in broken:
            push = self._under_way.pop(number)
            self.network.cancel(self._heap.now, number)
            if push.target.ref == ref:
                self._answer(push.source, push.action, f"decode worker {ref} hung up")
        self._look_later()

    # ---- inside --------------------------------------------------------------------------------

    def _look_later(self) -> None:
        """See to it that the next arrival is noticed."""
        at = self.network.next_done()
        if at != self._next_look:
            self._next_look = at
            self._heap.push(at, self._look, at)

    def _look(self, at: float) -> None:
        if at != self._next_look:
            return  # something has started or broken off meanwhile
        self._next_look = math.inf
        for number in self.network.take_done(at):
            self._arrived(number)
        self._look_later()

    def _arrived(self, number: int) -> None:
        push = self._under_way.pop(number, None)
        if push is None:
            return
        self._answer(push.source, push.action, push.target.land(push.header))

    def _answer(self, source: PrefillWorker, action: ho.Push, problem: str | None) -> None:
        at = self._heap.now + self._setup.latency
        self._heap.push(at, source.deliver, source.on_push_ended, action, problem)


def num_tokens(ticket: Ticket, first_block: int, num_blocks: int) -> int:
    """Tokens whose KV lies in these blocks of a ticket: the last block may not be full."""
    size = ticket.endpoints[0].layout.block_size
    return min(ticket.num_tokens, (first_block + num_blocks) * size) - first_block * size
