"""A cluster serving a workload in virtual time: the service's own lifecycle, schedulers, handoffs and policies.

Deterministic: the same setup and workload give the same outcomes. Nothing here looks at a clock or moves a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter

from .cluster import Cluster
from .heap import EventHeap
from .records import LinkUse, RequestOutcome, WorkerUse
from .requests import draw
from .setup import ClusterSetup
from .timeline import Timeline
from .workload.planned import PlannedRequest


class EnoughSeen(Exception):
    """Raised by a sink that needs no more outcomes: the simulation ends there."""


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """outcomes in order of index, empty when a sink took them; duration: when the last of them ended; events handled."""

    outcomes: tuple[RequestOutcome, ...]
    duration: float
    workers: tuple[WorkerUse, ...]
    links: tuple[LinkUse, ...]
    events: int


def simulate(
    setup: ClusterSetup,
    workload: Iterable[PlannedRequest],
    *,
    sink: Callable[[RequestOutcome], None] | None = None,
    timeline: Timeline | None = None,
    fast: bool = True,
) -> SimulationResult:
    """Offer `workload` (in order of time, taken as it is needed) to the cluster until every request has ended.

    sink      takes every outcome as it comes, in order of their ends; then nothing is kept of a request that is over.
              It may raise EnoughSeen
    timeline  is given the spans of every step and every request
    fast      take decode steps that recur many at a time: the outcomes are the same, sooner

    Raises InvalidRequest for a setup or a workload that cannot be, naming the field.
    """
    outcomes: list[RequestOutcome] = []
    take = outcomes.append if sink is None else sink

    def ended(outcome: RequestOutcome) -> None:
        take(outcome)
        if timeline is not None:
            draw(timeline, outcome)

    heap = EventHeap()
    cluster = Cluster(setup, heap, iter(workload), ended, timeline, fast)
    cluster.start()
    with suppress(EnoughSeen):
        heap.run()
    duration = cluster.ended_at
    return SimulationResult(
        outcomes=tuple(sorted(outcomes, key=attrgetter("index"))),
        duration=duration,
        workers=cluster.fleet.use(duration),
        links=cluster.fleet.transfers.network.use(),
        events=heap.num_events,
    )
