"""The router's table of live workers, and the frozen views of it that policies read.

Counters change with every event; a worker's view is rebuilt only when somebody looks, and only if it changed.
This module knows nothing of what happens to a request: it counts what others place and take away.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from ..core.errors import InternalError
from ..core.request import Attempt, WorkerRef
from ..core.view import ClusterView, Role, WorkerLoad, WorkerView


class Worker:
    """One live worker: what it reported, and what this router has placed on it.

    assigned    ids of the requests placed on it, in the order they came
    leased      attempts whose leases at this worker the router renews
    landed_at   when the last handoff from a prefill worker landed here
    """

    __slots__ = (
        "_pool",
        "_view",
        "assigned",
        "block_size",
        "context_tokens",
        "draining",
        "landed_at",
        "leased",
        "load",
        "pending_tokens",
        "ref",
        "role",
    )

    def __init__(self, ref: WorkerRef, role: Role, block_size: int, total_blocks: int, pool: _Pool) -> None:
        self.ref = ref
        self.role = role
        self.block_size = block_size
        self.load = WorkerLoad(free_blocks=total_blocks, total_blocks=total_blocks)  # until its first heartbeat
        self.draining = False
        self.pending_tokens = 0
        self.context_tokens = 0
        self.assigned: dict[str, None] = {}
        self.leased: dict[Attempt, None] = {}
        self.landed_at: dict[WorkerRef, float] = {}
        self._pool = pool
        self._view: WorkerView | None = None

    def changed(self) -> None:
        """Whoever changes what a view shows calls this."""
        self._view = None
        self._pool.views = None

    @property
    def queued_tokens(self) -> int:
        """Tokens to be prefilled here, whichever router placed them."""
        return self.pending_tokens + self.load.others_pending_tokens

    def view(self) -> WorkerView:
        if self._view is None:
            self._view = WorkerView(
                ref=self.ref,
                role=self.role,
                block_size=self.block_size,
                load=self.load,
                num_assigned=len(self.assigned) + self.load.others_assigned,
                pending_tokens=self.queued_tokens,
                context_tokens=self.context_tokens + self.load.others_context_tokens,
                draining=self.draining,
            )
        return self._view


class Share:
    """What one request counts for on one worker: `pending` of its prompt tokens, `context` tokens of KV."""

    __slots__ = ("context", "pending", "request_id", "worker")

    def __init__(self, worker: Worker, request_id: str, pending: int, context: int) -> None:
        self.worker = worker
        self.request_id = request_id
        self.pending = pending
        self.context = context
        worker.assigned[request_id] = None
        worker.pending_tokens += pending
        worker.context_tokens += context
        worker.changed()

    def prefilled(self) -> None:
        """The prompt's KV is computed."""
        if self.pending:
            self.worker.pending_tokens -= self.pending
            self.pending = 0
            self.worker.changed()

    def grow(self, context: int) -> None:
        """The sequence now has `context` tokens; what was counted in advance is not counted twice."""
        if context > self.context:
            self.worker.context_tokens += context - self.context
            self.context = context
            self.worker.changed()

    def leave(self) -> None:
        """The request has left the worker. Called once."""
        worker = self.worker
        del worker.assigned[self.request_id]
        worker.pending_tokens -= self.pending
        worker.context_tokens -= self.context
        worker.changed()


class WorkerTable:
    """All live workers, by reference."""

    def __init__(self) -> None:
        self._pools = {role: _Pool() for role in Role}
        self._workers: dict[WorkerRef, Worker] = {}
        self._epochs: dict[str, WorkerRef] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __contains__(self, ref: WorkerRef) -> bool:
        return ref in self._workers

    def get(self, ref: WorkerRef) -> Worker | None:
        return self._workers.get(ref)

    def routed(self, ref: WorkerRef) -> Worker:
        """The worker that a policy chose. Raises InternalError when it is not one that it was offered."""
        worker = self._workers.get(ref)
        if worker is None or worker.draining:
            raise InternalError(f"the routing policy chose {ref}, which takes no work; choose from the view")
        return worker

    def life_of(self, worker_id: str) -> WorkerRef | None:
        """The live epoch of a worker id."""
        return self._epochs.get(worker_id)

    def join(self, ref: WorkerRef, role: Role, block_size: int, total_blocks: int) -> None:
        pool = self._pools[role]
        worker = Worker(ref, role, block_size, total_blocks, pool)
        self._workers[ref] = worker
        self._epochs[ref.worker_id] = ref
        insort(pool.workers, worker, key=_by_id)
        pool.views = None

    def drain(self, worker: Worker) -> None:
        """It keeps what it has and leaves the views."""
        if not worker.draining:
            worker.draining = True
            pool = self._pools[worker.role]
            pool.workers.remove(worker)
            pool.views = None

    def remove(self, worker: Worker) -> None:
        """It is gone; shares in it may still be left."""
        self.drain(worker)
        del self._workers[worker.ref]
        if self._epochs.get(worker.ref.worker_id) == worker.ref:
            del self._epochs[worker.ref.worker_id]
        for other in self._workers.values():
            other.landed_at.pop(worker.ref, None)

    def view(self, now: float, draw: float, sequence_number: int, num_pending: int, num_active: int) -> ClusterView:
        return ClusterView(
            now=now,
            prefill=self._pools[Role.PREFILL].view(),
            decode=self._pools[Role.DECODE].view(),
            mixed=self._pools[Role.MIXED].view(),
            num_pending=num_pending,
            num_active=num_active,
            sequence_number=sequence_number,
            draw=draw,
        )


class _Pool:
    """The workers of one role that take new work, ordered by id, and their views while these are fresh."""

    __slots__ = ("views", "workers")

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.views: tuple[WorkerView, ...] | None = ()

    def view(self) -> tuple[WorkerView, ...]:
        if self.views is None:
            self.views = tuple([worker.view() for worker in self.workers])
        return self.views


def _by_id(worker: Worker) -> str:
    return worker.ref.worker_id
