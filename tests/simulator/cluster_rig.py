"""Simulated clusters for tests: prices that can be worked out by hand, and the books checked at the end of every run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from baton.core.shape import StepShape
from baton.core.view import Role
from baton.simulator.cluster import Cluster
from baton.simulator.heap import EventHeap
from baton.simulator.records import RequestOutcome
from baton.simulator.setup import ClusterSetup, PoolSetup
from baton.simulator.workload.planned import PlannedRequest


@dataclass(frozen=True, slots=True)
class FlatCost:
    """A step that prefills takes `prefill` seconds, any other `decode`, whatever is in it."""

    prefill: float = 1.0
    decode: float = 0.25
    stages: int = 1

    def seconds(self, shape: StepShape) -> float:
        return self.prefill if shape.prefill_rows else self.decode

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        return steps * self.decode


@dataclass(frozen=True, slots=True)
class BusyCost:
    """A price in which everything counts."""

    stages: int = 1

    def seconds(self, shape: StepShape) -> float:
        prefill = 3e-5 * shape.prefill_tokens + 1e-8 * shape.prefill_pairs
        return 0.004 + prefill + 2e-7 * shape.decode_context + 1.1e-5 * shape.decode_rows

    def decode_seconds(self, rows: int, context: int, steps: int) -> float:
        return steps * (0.004 + 1.1e-5 * rows + 2e-7 * context) + 2e-7 * rows * steps * (steps - 1) / 2


def pools(num_prefill: int, num_decode: int, num_mixed: int = 0, **fields: object) -> tuple[PoolSetup, ...]:
    """Pools of one kind of worker."""
    numbers = {Role.PREFILL: num_prefill, Role.DECODE: num_decode, Role.MIXED: num_mixed}
    defaults: dict[str, object] = {"cost": FlatCost()}
    return tuple(
        PoolSetup(role=role, replicas=number, **(defaults | fields))  # type: ignore[arg-type]
        for role, number in numbers.items()
        if number
    )


def cluster_setup(num_prefill: int, num_decode: int, num_mixed: int = 0, **fields: object) -> ClusterSetup:
    """A cluster of such pools; `network` and other fields of ClusterSetup may be among `fields`."""
    of_cluster = {name: fields.pop(name) for name in list(fields) if name in ClusterSetup.__dataclass_fields__}
    return ClusterSetup(pools(num_prefill, num_decode, num_mixed, **fields), **of_cluster)  # type: ignore[arg-type]


def poisson(count: int, rate: float, input_tokens: int, output_tokens: int, seed: int = 0) -> Iterator[PlannedRequest]:
    draws, at = Random(seed), 0.0
    for index in range(count):
        at += draws.expovariate(rate)
        yield PlannedRequest(index, at, input_tokens, output_tokens)


@dataclass
class Run:
    """A simulation that is over."""

    cluster: Cluster
    outcomes: list[RequestOutcome]

    @property
    def mean_ttft(self) -> float:
        times = [outcome.ttft for outcome in self.outcomes if outcome.ttft is not None]
        assert len(times) == len(self.outcomes)
        return sum(times) / len(times)


def run(setup: ClusterSetup, workload: Iterable[PlannedRequest], fast: bool = True) -> Run:
    """Simulate, and check that nothing is lost and nothing is left."""
    offered: list[int] = []

    def counted() -> Iterator[PlannedRequest]:
        for planned in workload:
            offered.append(planned.index)
            yield planned

    heap, outcomes = EventHeap(), list[RequestOutcome]()
    cluster = Cluster(setup, heap, counted(), outcomes.append, None, fast)
    cluster.start()
    heap.run()
    assert sorted(outcome.index for outcome in outcomes) == sorted(offered)
    cluster.lifecycle.check()
    assert cluster.lifecycle.num_active == 0
    assert cluster.fleet.transfers.num_under_way == 0
    for worker in cluster.fleet.alive:
        worker.scheduler.check()
        assert not worker.scheduler.has_work
        assert worker.num_used == 0
        assert worker.num_tickets == worker.num_waiting == worker.blocks.num_quarantined == 0
    outcomes.sort(key=lambda outcome: outcome.index)
    return Run(cluster, outcomes)
