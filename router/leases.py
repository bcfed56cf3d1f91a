"""Which tickets are open at which worker, and when they are renewed.

One timer serves all of them, and runs only while a handoff is open: an idle router wakes up for nothing.
"""

from __future__ import annotations

from ..core.request import Attempt, WorkerRef
from .events import Action, SendRenew, SetTimer, Timer
from .worker_table import Worker

LEASE_TIMER = Timer("lease")


class Leases:
    """The open handoffs, by worker."""

    def __init__(self, lease: float) -> None:
        self._interval = lease / 3
        self._open: dict[WorkerRef, Worker] = {}
        self._armed = False

    def open(self, worker: Worker, attempt: Attempt) -> None:
        worker.leased[attempt] = None
        self._open[worker.ref] = worker

    def close(self, worker: Worker, attempt: Attempt) -> None:
        """Harmless when it is closed already."""
        if attempt in worker.leased:
            del worker.leased[attempt]
            if not worker.leased:
                del self._open[worker.ref]

    def arm(self, now: float, out: list[Action]) -> None:
        """Start the timer unless it runs already or nothing needs it."""
        if self._open and not self._armed:
            self._armed = True
            out.append(SetTimer(LEASE_TIMER, now + self._interval))

    def fired(self, now: float, out: list[Action]) -> None:
        """Renew everything that is open."""
        if not self._armed:
            return
        self._armed = False
        for worker in self._open.values():
            out.append(SendRenew(worker.ref, tuple(worker.leased)))
        self.arm(now, out)

    def num_open(self) -> int:
        return sum(len(worker.leased) for worker in self._open.values())
