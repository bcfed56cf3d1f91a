"""The lifecycle's integrity check: counters and sets against what they stand for."""

from __future__ import annotations

from ..core.errors import InternalError
from ..core.request import Attempt, WorkerRef
from .dispatch import Dispatcher
from .flight import Flight, Stage
from .worker_table import WorkerTable


def check(workers: WorkerTable, dispatcher: Dispatcher) -> None:
    """Raise InternalError naming the first thing that is wrong."""
    shares = [
        (share, flight) for flight in dispatcher.flights.values() for share in (flight.source, flight.target) if share is not None
    ]
    for flight in dispatcher.flights.values():
        _check_flight(flight)
    for share, flight in shares:
        if share.worker.ref not in workers:
            raise InternalError(f"{flight.attempt} is placed on {share.worker.ref}, which is not alive")
    pending = sum(flight.stage is Stage.PENDING for flight in dispatcher.flights.values())
    _expect("pending requests", dispatcher.num_pending, pending)
    leased: dict[WorkerRef, set[Attempt]] = {}
    for share, flight in shares:
        if flight.split and not flight.adopted and not (share is flight.source and flight.handed_over):
            leased.setdefault(share.worker.ref, set()).add(flight.attempt)
    _expect("open leases", dispatcher.leases.num_open(), sum(map(len, leased.values())))
    for worker in workers:
        here = [(share, flight) for share, flight in shares if share.worker is worker]
        _expect(f"requests on {worker.ref}", set(worker.assigned), {flight.request.id for _, flight in here})
        _expect(f"pending tokens of {worker.ref}", worker.pending_tokens, sum(share.pending for share, _ in here))
        _expect(f"context tokens of {worker.ref}", worker.context_tokens, sum(share.context for share, _ in here))
        _expect(f"leases at {worker.ref}", set(worker.leased), leased.get(worker.ref, set()))


def _check_flight(flight: Flight) -> None:
    placed = flight.stage not in (Stage.PENDING, Stage.RETRY)
    if placed != (flight.target is not None):
        raise InternalError(f"{flight.attempt} is in stage {flight.stage} and {'has no' if placed else 'has a'} target worker")
    if flight.source is not None and (flight.target is None or not flight.split):
        raise InternalError(f"{flight.attempt} has a prefill worker but is not split")
    if placed and flight.stage is not flight.current_stage():
        raise InternalError(f"{flight.attempt} is in stage {flight.stage}, its messages say {flight.current_stage()}")


def _expect(what: str, counted: object, true: object) -> None:
    if counted != true:
        raise InternalError(f"{what}: counted {counted!r}, in truth {true!r}")
