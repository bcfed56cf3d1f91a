"""Every routing decision of the cluster, as one pure state machine: events in, actions out.

No clock, no I/O, no randomness: time and draws come in on the events. Each `Arrived` gets exactly one
`Complete`, whatever happens in between. The parts: `worker_table` counts what is placed where, `flight` knows where
one request stands, `dispatch` places and releases, `stages` judges delays, `recovery` deals with failures,
`leases` renews. Work per event does not grow with the number of requests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from ..core.errors import Cancelled as CancelledError
from ..core.errors import DeadlineExceeded, InvalidRequest, Overloaded
from ..core.request import Attempt, WorkerRef
from ..core.view import ClusterView
from ..policy.admission import AdmissionPolicy
from ..policy.routing import RoutingPolicy
from .dispatch import Dispatcher
from .events import (
    Action,
    Adopted,
    Arrived,
    AttemptFailed,
    Cancelled,
    Complete,
    Event,
    Finished,
    FirstToken,
    Granted,
    HandedOver,
    Preempted,
    Progress,
    SendAbort,
    SendGrant,
    SetTimer,
    Timer,
    TimerFired,
    WorkerConfirmedDead,
    WorkerDraining,
    WorkerJoined,
    WorkerLost,
    WorkerReported,
)
from .flight import Flight, FlightSnapshot, snapshot_of
from .integrity import check
from .lifecycle_config import LifecycleConfig
from .recovery import Recovery
from .worker_table import WorkerTable

__all__ = ["Lifecycle", "LifecycleConfig"]


class Lifecycle:
    """The router's brain. One instance per router life; not thread-safe."""

    def __init__(self, config: LifecycleConfig, route: RoutingPolicy, admit: AdmissionPolicy) -> None:
        self._config = config
        self._admit = admit
        self._workers = WorkerTable()
        self._dispatcher = Dispatcher(config, route, self._workers)
        self._recovery = Recovery(config, self._workers, self._dispatcher)

    @property
    def num_active(self) -> int:
        """Requests that have not ended, those that wait for a worker included."""
        return len(self._dispatcher.flights)

    @property
    def num_pending(self) -> int:
        """Requests that wait for a worker to exist."""
        return self._dispatcher.num_pending

    def view(self, now: float, draw: float = 0.0) -> ClusterView:
        """The cluster as a policy would see it now."""
        return self._dispatcher.view(now, draw)

    def check(self) -> None:
        """Compare all counters with what they count. Raises InternalError; slow, for tests and idle moments."""
        check(self._workers, self._dispatcher)

    def snapshot(self) -> dict[str, FlightSnapshot]:
        """Where every request stands."""
        return {request_id: snapshot_of(flight) for request_id, flight in self._dispatcher.flights.items()}

    def handle(self, event: Event) -> list[Action]:
        """Take note of `event` and return what is to be done now, in this order."""
        out: list[Action] = []
        match event:
            case Progress() | FirstToken() | Granted() | Adopted() | HandedOver() | Finished() | AttemptFailed() | Preempted():
                self._on_attempt(event, out)
            case TimerFired(now, timer):
                self._on_timer(timer, now, out)
            case Arrived():
                self._on_arrived(event, out)
            case Cancelled():
                self._on_cancelled(event, out)
            case _:
                self._on_worker(event, out)
        return out

    # ---- requests --------------------------------------------------------------------------------

    def _on_arrived(self, event: Arrived, out: list[Action]) -> None:
        request, now = event.request, event.now
        if request.id in self._dispatcher.flights:
            message = f"request id {request.id} is in use; every request needs an id of its own"
            out.append(Complete(request.id, InvalidRequest.code, message))
            return
        deadline = request.arrival + self._config.request_timeout if request.deadline is None else request.deadline
        if now >= deadline:
            out.append(Complete(request.id, DeadlineExceeded.code, f"the deadline of request {request.id} is over already"))
            return
        if request.slo is None:
            request = replace(request, slo=self._config.slo)
        refusal = self._admit(request, self.view(now, event.draw))
        if refusal is not None:
            out.append(Complete(request.id, Overloaded.code, refusal.reason, refusal.retry_after))
            return
        flight = Flight(request, event.draw, deadline, Attempt(request.id, 0), since=now)
        self._dispatcher.flights[request.id] = flight
        out.append(SetTimer(Timer("deadline", request.id), deadline))
        self._dispatcher.place(flight, now, out)

    def _on_cancelled(self, event: Cancelled, out: list[Action]) -> None:
        flight = self._dispatcher.flights.get(event.request_id)
        if flight is None:
            return
        if event.done:
            complete = Complete(event.request_id)
        else:
            complete = Complete(event.request_id, CancelledError.code, f"request {event.request_id} was cancelled")
        self._dispatcher.end(flight, complete, out)

    def _on_timer(self, timer: Timer, now: float, out: list[Action]) -> None:
        if timer.kind == "lease":
            self._dispatcher.leases.fired(now, out)
            return
        flight = self._dispatcher.flights.get(timer.request_id)
        if flight is None:
            return
        if timer.kind == "stage":
            self._recovery.stage_fired(flight, timer, now, out)
        elif timer.kind == "deadline" and now < flight.deadline:  # it came early, or was of an earlier request of this id
            out.append(SetTimer(timer, flight.deadline))
        elif timer.kind == "deadline":
            waited = now - flight.request.arrival
            message = f"request {timer.request_id} was given up after {waited:.1f} s, in stage {flight.stage}"
            self._dispatcher.end(flight, Complete(timer.request_id, DeadlineExceeded.code, message), out)

    # ---- attempts --------------------------------------------------------------------------------

    def _on_attempt(
        self,
        event: Progress | FirstToken | Granted | Adopted | HandedOver | Finished | AttemptFailed | Preempted,
        out: list[Action],
    ) -> None:
        """What a worker says of an attempt: believed only of the attempt in flight, and of workers that are part of it."""
        flight = self._dispatcher.flights.get(event.attempt.request_id)
        if flight is None or flight.attempt != event.attempt or not flight.is_on(event.worker):
            if isinstance(event, Granted | Adopted):
                self._drop_stale(event.worker, event.attempt, out)
            return
        match event:
            case Progress():
                self._on_output(flight, event.num_output)
                self._on_stage(flight, event.now, out)
            case FirstToken():
                self._on_output(flight, flight.base_output + 1)
                self._on_stage(flight, event.now, out)
            case Granted():
                if flight.split and flight.is_target(event.worker) and not flight.granted:
                    self._on_granted(flight, event, out)
            case Adopted():
                if flight.split and flight.is_target(event.worker) and not flight.adopted:
                    self._on_adopted(flight, event, out)
            case HandedOver():
                if flight.is_source(event.worker):
                    self._on_handed_over(flight, event.now, out)
            case Finished():
                self._dispatcher.end(flight, Complete(flight.request.id), out, done=event.worker)
            case AttemptFailed():
                self._recovery.failed(flight, event, out)
            case Preempted():
                self._recovery.preempted(flight, event, out)

    def _on_output(self, flight: Flight, num_output: int) -> None:
        """The client has `num_output` tokens: more than the attempt began with means that its prefill is done."""
        flight.num_output = max(flight.num_output, num_output)
        if num_output <= flight.base_output or flight.target is None:
            return
        flight.first_token = True
        flight.target.grow(flight.known_tokens)
        (flight.source or flight.target).prefilled()
        if flight.handed_over:
            self._dispatcher.release_source(flight)

    def _on_granted(self, flight: Flight, event: Granted, out: list[Action]) -> None:
        flight.granted = True
        if flight.source is not None and not flight.handed_over:
            out.append(SendGrant(flight.source.worker.ref, flight.attempt, event.ticket))
        self._on_stage(flight, event.now, out)

    def _on_adopted(self, flight: Flight, event: Adopted, out: list[Action]) -> None:
        """The ticket is used up: neither end needs its lease any more."""
        flight.granted = flight.adopted = True
        if flight.target is not None:
            self._dispatcher.leases.close(flight.target.worker, flight.attempt)
            if flight.source is not None:
                flight.target.worker.landed_at[flight.source.worker.ref] = event.now
                self._dispatcher.leases.close(flight.source.worker, flight.attempt)
        self._on_stage(flight, event.now, out)

    def _on_handed_over(self, flight: Flight, now: float, out: list[Action]) -> None:
        """The prefill worker is free, but stays part of the attempt until its first token has come."""
        flight.handed_over = True
        if flight.source is not None:
            self._dispatcher.leases.close(flight.source.worker, flight.attempt)
        if flight.first_token:
            self._dispatcher.release_source(flight)
        self._on_stage(flight, now, out)

    def _on_stage(self, flight: Flight, now: float, out: list[Action]) -> None:
        stage = flight.current_stage()
        if stage is not flight.stage:
            self._dispatcher.enter(flight, stage, now, out)

    def _drop_stale(self, worker: WorkerRef, attempt: Attempt, out: list[Action]) -> None:
        """It holds blocks for an attempt that nobody waits for."""
        if worker in self._workers:
            out.append(SendAbort(worker, attempt))

    # ---- workers ---------------------------------------------------------------------------------

    def _on_worker(
        self, event: WorkerJoined | WorkerReported | WorkerDraining | WorkerLost | WorkerConfirmedDead, out: list[Action]
    ) -> None:
        worker = self._workers.get(event.worker)
        match event:
            case WorkerReported(load=load):
                if worker is not None:
                    worker.load = load
                    worker.changed()
            case WorkerJoined():
                self._recovery.joined(event, out)
            case WorkerDraining():
                if worker is not None:
                    self._workers.drain(worker)
            case WorkerLost(now, _, reason):
                if worker is not None:
                    self._recovery.lost(worker, now, reason, out)
            case WorkerConfirmedDead():
                self._recovery.confirmed_dead(event, out)
            case _:
                assert_never(event)
