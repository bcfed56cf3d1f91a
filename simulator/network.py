"""Links that KV moves over, in virtual time: every transfer gets its max-min fair share of the links that it crosses.

Every node has one link out and one in; a transfer within a node crosses that node's internal link alone. Rates are
found by water-filling (Bertsekas and Gallager, Data Networks, 6.5.2) and hold until a transfer of the same connected
part of the network starts or ends. Must never move time by itself: the caller says what time it is, and time never
goes back.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.errors import InternalError
from .records import LinkUse
from .setup import NetworkSetup


class Network:
    """All links of a cluster and the transfers under way. Nodes and transfers are named by numbers."""

    def __init__(self, setup: NetworkSetup) -> None:
        self._setup = setup
        self._now = -math.inf
        self._links: dict[tuple[int, str], _Link] = {}
        self._moving: dict[int, _Transfer] = {}
        self._landing: list[tuple[float, int]] = []  # heap of (arrival, transfer): the last byte left, the latency runs
        self._next_end = math.inf  # when the next of `_moving` has moved its last byte

    def start(self, now: float, transfer: int, source: int, target: int, num_bytes: float) -> None:
        """Begin to move `num_bytes` from node `source` to node `target`. Raises InternalError for a transfer that exists."""
        if transfer in self._moving or any(transfer == landing for _, landing in self._landing):
            raise InternalError(f"transfer {transfer} is started twice")
        if not 0 <= num_bytes < math.inf:
            raise InternalError(f"transfer {transfer} has {num_bytes} bytes; needed: a finite number, 0 or more")
        self._advance(now)
        new = _Transfer(transfer, self._route(source, target), now, num_bytes)
        for link in new.links:
            link.bytes += num_bytes
        if num_bytes == 0 or math.isinf(new.links[0].capacity):  # both links of a route have the same capacity
            heapq.heappush(self._landing, (now + self._setup.latency, transfer))
            return
        self._moving[transfer] = new
        for link in new.links:
            link.join(new, now)
        self._share_again(new.links)
        for link in new.links:
            link.peak_backlog = max(link.peak_backlog, link.left_at(now))

    def cancel(self, now: float, transfer: int) -> None:
        """Stop a transfer: what has not left its source never does. One that is unknown or has arrived is left alone."""
        self._advance(now)
        stopped = self._moving.pop(transfer, None)
        if stopped is not None:
            left = stopped.left_at(now)
            for link in stopped.links:
                link.bytes -= left
            self._end([stopped])
        elif any(transfer == landing for _, landing in self._landing):
            self._landing = [entry for entry in self._landing if entry[1] != transfer]
            heapq.heapify(self._landing)

    def next_done(self) -> float:
        """When the next transfer arrives if none is started or cancelled before; inf when nothing is under way."""
        arrival = self._landing[0][0] if self._landing else math.inf
        return min(arrival, self._next_end + self._setup.latency)

    def take_done(self, now: float) -> list[int]:
        """The transfers whose last byte, plus latency, has arrived by `now`: in order of arrival, then by number."""
        self._advance(now)
        done = []
        while self._landing and self._landing[0][0] <= now:
            done.append(heapq.heappop(self._landing)[1])
        return done

    def use(self) -> tuple[LinkUse, ...]:
        """What every link has done until the last call that named a time; links that were never asked for are left out."""
        return tuple(link.use(self._now) for _, link in sorted(self._links.items()))

    def _route(self, source: int, target: int) -> tuple[_Link, ...]:
        if source == target:
            return (self._link(source, "internal", self._setup.node_bandwidth),)
        bandwidth = self._setup.bandwidth
        return self._link(source, "out", bandwidth), self._link(target, "in", bandwidth)

    def _link(self, node: int, direction: str, capacity: float) -> _Link:
        link = self._links.get((node, direction))
        if link is None:
            link = self._links[node, direction] = _Link(f"node {node} {direction}", capacity)
        return link

    def _advance(self, now: float) -> None:
        """Let everything happen that happens until `now`: a transfer that ends leaves its bandwidth to others at once."""
        if now < self._now:
            raise InternalError(f"time goes back from {self._now} to {now}")
        while (end := self._next_end) <= now:
            self._now = end
            ended = [moving for moving in self._moving.values() if moving.end <= end]
            for moving in ended:
                del self._moving[moving.number]
                heapq.heappush(self._landing, (end + self._setup.latency, moving.number))
            self._end(ended)
        self._now = now

    def _end(self, ended: Iterable[_Transfer]) -> None:
        for moving in ended:
            for link in moving.links:
                link.leave(moving, self._now)
        self._share_again(link for moving in ended for link in moving.links)

    def _share_again(self, changed: Iterable[_Link]) -> None:
        """Give new rates to all transfers that are connected, through shared links, with one of `changed`."""
        if len(self._moving) == 1:  # the common case: it has its links to itself
            (alone,) = self._moving.values()
            alone.set_rate(alone.links[0].capacity, self._now)
            self._next_end = alone.end
            return
        links = {id(link): link for link in changed if link.moving}
        queue = list(links.values())
        transfers: dict[int, _Transfer] = {}
        while queue:
            for number, moving in queue.pop().moving.items():
                if number not in transfers:
                    transfers[number] = moving
                    new = [link for link in moving.links if id(link) not in links]
                    links.update((id(link), link) for link in new)
                    queue += new
        for moving, rate in _fair_rates(list(links.values())):
            moving.set_rate(rate, self._now)
        self._next_end = min((moving.end for moving in self._moving.values()), default=math.inf)


@dataclass(slots=True, eq=False)
class _Link:
    """One direction of one node's network. bytes counts what its transfers were asked to move, less what was cancelled."""

    name: str
    capacity: float
    bytes: float = 0.0
    busy: float = 0.0
    busy_since: float = 0.0
    peak_backlog: float = 0.0
    moving: dict[int, _Transfer] = field(default_factory=dict)

    def join(self, transfer: _Transfer, now: float) -> None:
        if not self.moving:
            self.busy_since = now
        self.moving[transfer.number] = transfer

    def leave(self, transfer: _Transfer, now: float) -> None:
        del self.moving[transfer.number]
        if not self.moving:
            self.busy += now - self.busy_since

    def use(self, now: float) -> LinkUse:
        busy = self.busy + (now - self.busy_since if self.moving else 0.0)
        return LinkUse(self.name, self.bytes - self.left_at(now), busy, self.peak_backlog)

    def left_at(self, now: float) -> float:
        """Bytes that are under way and have not crossed it."""
        return math.fsum(moving.left_at(now) for moving in self.moving.values())


@dataclass(slots=True, eq=False)
class _Transfer:
    """Bytes under way: `left` of them at `since`, from when on they move at `rate` and are gone at `end`."""

    number: int
    links: tuple[_Link, ...]
    since: float
    left: float
    rate: float = 0.0
    end: float = math.inf

    def left_at(self, now: float) -> float:
        return max(self.left - self.rate * (now - self.since), 0.0)

    def set_rate(self, rate: float, now: float) -> None:
        if rate != self.rate:  # an unchanged rate keeps its end to the last bit
            self.left, self.since, self.rate = self.left_at(now), now, rate
            self.end = now + self.left / rate


def _fair_rates(links: list[_Link]) -> list[tuple[_Transfer, float]]:
    """Max-min fair rates: again and again, the link with the smallest share for each of its open transfers fixes theirs."""
    spare = {id(link): link.capacity for link in links}
    num_open = {id(link): len(link.moving) for link in links}
    rates: dict[int, tuple[_Transfer, float]] = {}
    while links:
        tightest = min(links, key=lambda link: spare[id(link)] / num_open[id(link)])
        rate = spare[id(tightest)] / num_open[id(tightest)]
        for number, moving in tightest.moving.items():
            if number not in rates:
                rates[number] = (moving, rate)
                for link in moving.links:
                    spare[id(link)] -= rate
                    num_open[id(link)] -= 1
        links = [link for link in links if num_open[id(link)]]
    return list(rates.values())
