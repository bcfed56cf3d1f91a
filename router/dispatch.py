"""Where attempts begin and requests end: the table of flights, the queue of those that wait, routing and release.

Everything that a worker may hold for an attempt is released here and nowhere else: `release` sends the
aborts, takes the shares out of the counters and closes the leases.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..core.request import WorkerRef
from ..core.view import ClusterView, Route, Split, WorkerView
from ..policy.routing import RoutingPolicy
from .events import Action, Complete, SendAbort, SendPrefill, SendReserve, SendRun, SetTimer, Timer
from .flight import Flight, Stage
from .leases import Leases
from .lifecycle_config import LifecycleConfig
from .stages import stage_limit
from .worker_table import Share, WorkerTable

# A request whose only choice are workers that failed it waits before its third attempt and later ones, twice
# as long each time: long enough together for a dead worker to be noticed before the attempts run out.
RETRY_DELAY = 0.05
MAX_RETRY_DELAY = 2.0

GOLDEN_RATIO = 0.6180339887498949  # spreads the draws of later attempts evenly over [0, 1)


class Dispatcher:
    """Places flights on workers and takes them off again."""

    def __init__(self, config: LifecycleConfig, route: RoutingPolicy, workers: WorkerTable) -> None:
        self.flights: dict[str, Flight] = {}
        self.leases = Leases(config.lease)
        self._config = config
        self._route = route
        self._workers = workers
        self._sequence_number = 0
        self._resumed: dict[str, Flight] = {}  # had a worker before: first in line
        self._waiting: dict[str, Flight] = {}

    @property
    def num_pending(self) -> int:
        return len(self._resumed) + len(self._waiting)

    def view(self, now: float, draw: float) -> ClusterView:
        """The cluster as a policy would see it now."""
        return self._workers.view(now, draw, self._sequence_number, self.num_pending, len(self.flights))

    def place(self, flight: Flight, now: float, out: list[Action], avoid: Iterable[WorkerRef] = ()) -> None:
        """Start an attempt, or let the flight wait. Workers in `avoid` and those that failed it come last."""
        draw = (flight.draw + flight.attempt.number * GOLDEN_RATIO) % 1.0
        view = self.view(now, draw)
        self._sequence_number += 1
        if view.decode and flight.known_tokens <= self._config.local_prefill_tokens:
            view = replace(view, prefill=())  # the decode worker prefills short prompts itself
        avoided = {*flight.avoid, *avoid}
        if avoided:
            view = _prefer_others(view, avoided)
        route = self._route(flight.request, view)
        if route is None:
            self._wait(flight, now)
        elif flight.failures > 1 and _uses(route, flight.avoid) and flight.stage is not Stage.RETRY:
            self._delay(flight, now, out)
        else:
            self._begin(flight, route, now, out)

    def place_pending(self, now: float, out: list[Action]) -> None:
        """A worker joined: whoever can be placed now is placed, in order."""
        for flight in [*self._resumed.values(), *self._waiting.values()]:
            self.place(flight, now, out)

    def release(self, flight: Flight, out: list[Action], done: WorkerRef | None = None) -> None:
        """Leave every worker; those that may still hold something of the attempt (all but `done`) are told to drop it."""
        for share in (flight.target, flight.source):
            if share is not None:
                self._leave(flight, share)
                if share.worker.ref != done and share.worker.ref in self._workers:
                    out.append(SendAbort(share.worker.ref, flight.attempt))
        flight.source = flight.target = None
        self._resumed.pop(flight.request.id, None)
        self._waiting.pop(flight.request.id, None)

    def release_source(self, flight: Flight) -> None:
        """The prefill worker holds nothing any more."""
        if flight.source is not None:
            self._leave(flight, flight.source)
            flight.source = None

    def end(self, flight: Flight, complete: Complete, out: list[Action], done: WorkerRef | None = None) -> None:
        """The request leaves the lifecycle."""
        self.release(flight, out, done)
        del self.flights[flight.request.id]
        out.append(complete)

    def enter(self, flight: Flight, stage: Stage, now: float, out: list[Action]) -> None:
        """The flight has reached `stage`: set the stage's deadline."""
        flight.stage = stage
        self.watch(flight, now, out)

    def watch(self, flight: Flight, now: float, out: list[Action]) -> None:
        """The stage's time counts from now."""
        flight.since = now
        flight.mark = flight.num_output
        limit = stage_limit(flight, self._config)
        if limit is not None:
            out.append(SetTimer(stage_timer(flight), now + limit))

    def prolong(self, flight: Flight, until: float, out: list[Action]) -> None:
        """The stage's time goes on counting, up to a later moment."""
        out.append(SetTimer(stage_timer(flight), until))

    # ---- inside ----------------------------------------------------------------------------------

    def _wait(self, flight: Flight, now: float) -> None:
        """No worker can take it; whoever had one before comes before those that never had."""
        queue = self._resumed if flight.attempt.number else self._waiting
        queue[flight.request.id] = flight
        flight.stage, flight.since = Stage.PENDING, now

    def _delay(self, flight: Flight, now: float, out: list[Action]) -> None:
        self._resumed.pop(flight.request.id, None)
        flight.stage, flight.since = Stage.RETRY, now
        delay = min(MAX_RETRY_DELAY, RETRY_DELAY * 2.0 ** (flight.failures - 2))
        out.append(SetTimer(stage_timer(flight), now + delay))

    def _begin(self, flight: Flight, route: Route, now: float, out: list[Action]) -> None:
        """Send the new attempt on its way: the reservation leaves together with the prefill."""
        request_id = flight.request.id
        self._resumed.pop(request_id, None)
        self._waiting.pop(request_id, None)
        attempt = flight.next_attempt()
        known = flight.known_tokens
        ahead = min(self._config.head_room, max(0, flight.request.sampling.max_tokens - flight.num_output))
        if isinstance(route, Split):
            source, target = self._workers.routed(route.prefill), self._workers.routed(route.decode)
            flight.split = True
            flight.source = Share(source, request_id, pending=known, context=known)
            flight.target = Share(target, request_id, pending=0, context=known + ahead)
            self.leases.open(source, attempt)
            self.leases.open(target, attempt)
            out.append(SendReserve(target.ref, attempt, source.ref))
            out.append(SendPrefill(source.ref, attempt, target.ref))
            self.leases.arm(now, out)
        else:
            worker = self._workers.routed(route.worker)
            flight.split = False
            flight.target = Share(worker, request_id, pending=known, context=known + ahead)
            out.append(SendRun(worker.ref, attempt))
        self.enter(flight, Stage.PREFILL, now, out)

    def _leave(self, flight: Flight, share: Share) -> None:
        self.leases.close(share.worker, flight.attempt)
        share.leave()


def stage_timer(flight: Flight) -> Timer:
    return Timer("stage", flight.request.id, flight.attempt.number, flight.stage.value)


def _uses(route: Route, workers: Iterable[WorkerRef]) -> bool:
    chosen = (route.prefill, route.decode) if isinstance(route, Split) else (route.worker,)
    return any(ref in workers for ref in chosen)


def _prefer_others(view: ClusterView, avoid: set[WorkerRef]) -> ClusterView:
    """The view without the workers to avoid; a pool that would be empty stays as it is."""

    def others(pool: tuple[WorkerView, ...]) -> tuple[WorkerView, ...]:
        return tuple([worker for worker in pool if worker.ref not in avoid]) or pool

    return replace(view, prefill=others(view.prefill), decode=others(view.decode), mixed=others(view.mixed))
