"""What happens when something goes wrong: attempts that fail, stages that take too long, workers that are lost.

A failed attempt is dropped at every worker that may hold something of it, and a new one starts elsewhere
with the tokens the client has. The client sees an error only when that has failed too often.
"""

from __future__ import annotations

from ..core.errors import InternalError, Unavailable
from ..core.request import WorkerRef
from .dispatch import Dispatcher
from .events import Action, AttemptFailed, Complete, KillWorker, Preempted, SendGone, Timer, WorkerConfirmedDead, WorkerJoined
from .flight import Flight, Stage
from .lifecycle_config import LifecycleConfig
from .stages import is_explained, stage_limit
from .worker_table import Worker, WorkerTable

REMEMBERED_WORKERS = 256  # lost or dead lives of workers that are remembered


class Recovery:
    """Retries attempts and buries workers."""

    def __init__(self, config: LifecycleConfig, workers: WorkerTable, dispatcher: Dispatcher) -> None:
        self._config = config
        self._workers = workers
        self._dispatcher = dispatcher
        self._lost: dict[WorkerRef, None] = {}  # declared dead; its death is not confirmed yet
        self._dead: dict[WorkerRef, None] = {}  # confirmed; told to workers that join later

    # ---- attempts --------------------------------------------------------------------------------

    def failed(self, flight: Flight, event: AttemptFailed, out: list[Action]) -> None:
        """A worker of the attempt in flight gave it up."""
        if flight.is_source(event.worker) and flight.survives_source():
            self._dispatcher.release_source(flight)  # it only failed to hear that the KV has landed
        elif event.retriable:
            self.retry(flight, event.now, f"{event.worker}: {event.reason}", [event.worker], out)
        else:
            message = f"request {flight.request.id} failed at {event.worker}: {event.reason}"
            self._dispatcher.end(flight, Complete(flight.request.id, InternalError.code, message), out)

    def preempted(self, flight: Flight, event: Preempted, out: list[Action]) -> None:
        """Not a failure: the sequence goes on wherever there is room, if possible not where there is none."""
        self._dispatcher.release(flight, out, done=event.worker)
        self._dispatcher.place(flight, event.now, out, avoid=[event.worker])

    def retry(self, flight: Flight, now: float, reason: str, blame: list[WorkerRef], out: list[Action]) -> None:
        """The attempt in flight failed: another one, unless there were too many."""
        flight.failures += 1
        flight.avoid.extend(ref for ref in blame if ref not in flight.avoid)
        if flight.failures < self._config.max_attempts:
            self._dispatcher.release(flight, out)
            self._dispatcher.place(flight, now, out)
        else:
            message = f"request {flight.request.id} failed {flight.failures} times, the last time because of {reason}"
            self._dispatcher.end(flight, Complete(flight.request.id, Unavailable.code, message), out)

    def stage_fired(self, flight: Flight, timer: Timer, now: float, out: list[Action]) -> None:
        """A stage reached its limit: it is excused, prolonged by what is predicted now, or given up."""
        if timer.attempt != flight.attempt.number or timer.stage != flight.stage:
            return
        if flight.stage is Stage.RETRY:
            self._dispatcher.place(flight, now, out)
            return
        limit = stage_limit(flight, self._config)
        if limit is None:
            return
        if is_explained(flight):
            flight.patience += flight.stage is Stage.HANDOVER
            self._dispatcher.watch(flight, now, out)
        elif now < flight.since + limit:
            self._dispatcher.prolong(flight, flight.since + limit, out)
        else:
            shares = [share for share in (flight.source, flight.target) if share is not None]
            if flight.stage is Stage.PREFILL:
                shares = shares[:1]  # the worker that prefills is to blame
            blame = [share.worker.ref for share in shares]
            reason = f"stage {flight.stage} took more than {limit:.1f} s at {', '.join(map(str, blame))}"
            self.retry(flight, now, reason, blame, out)

    # ---- workers ---------------------------------------------------------------------------------

    def joined(self, event: WorkerJoined, out: list[Action]) -> None:
        """A new life of a worker; an older one of the same id is lost."""
        ref = event.worker
        if ref in self._workers or ref in self._dead:
            return
        if ref in self._lost:  # it woke up: what it still holds is stale, it must come back as a new life
            out.append(KillWorker(ref, "it was declared dead and must register under a new epoch"))
            return
        older = self._workers.life_of(ref.worker_id)
        # The new life joins first, so that the old one's requests may move to it.
        self._workers.join(ref, event.role, event.block_size, event.total_blocks)
        out.extend(SendGone(ref, gone) for gone in self._dead)
        replaced = self._workers.get(older) if older is not None else None
        if replaced is not None:
            self.lost(replaced, event.now, f"{ref} took its place", out)
        self._dispatcher.place_pending(event.now, out)

    def lost(self, worker: Worker, now: float, reason: str, out: list[Action]) -> None:
        """Treat a live worker as dead, and see to it that it is."""
        out.append(KillWorker(worker.ref, reason))
        _remember(self._lost, worker.ref)
        self._bury(worker, now, reason, out)

    def confirmed_dead(self, event: WorkerConfirmedDead, out: list[Action]) -> None:
        """Nobody writes for this worker any more. It may come as the first news of its death."""
        worker = self._workers.get(event.worker)
        if worker is not None:
            self._bury(worker, event.now, "its process ended", out)
        self._lost.pop(event.worker, None)
        if event.worker not in self._dead:
            _remember(self._dead, event.worker)
            out.extend(SendGone(other.ref, event.worker) for other in self._workers)

    def _bury(self, worker: Worker, now: float, reason: str, out: list[Action]) -> None:
        self._workers.remove(worker)
        for request_id in tuple(worker.assigned):
            flight = self._dispatcher.flights[request_id]
            if flight.is_source(worker.ref) and flight.survives_source():
                self._dispatcher.release_source(flight)
            else:
                self.retry(flight, now, f"the loss of {worker.ref}: {reason}", [worker.ref], out)


def _remember(refs: dict[WorkerRef, None], ref: WorkerRef) -> None:
    refs[ref] = None
    if len(refs) > REMEMBERED_WORKERS:
        del refs[next(iter(refs))]
