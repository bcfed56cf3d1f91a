"""One rate tried on one placement with the simulator: the service's own lifecycle and schedulers, in virtual time.

Counted are `num_requests` outcomes in the order in which they come, in the middle of a longer stream: in a steady state those
that end in some stretch of time are as good a sample as those that begin in it, and nobody needs to wait for the last one. What
ends before the cluster is as full as it gets is not counted; a trial ends when the verdict is certain. All that is here can
be pickled, so that trials run in any process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..core.slo import Slo
from ..core.view import Role
from ..simulator.records import RequestOutcome
from ..simulator.report import OutcomeTally, SimulationReport, make_report
from ..simulator.setup import ClusterSetup, NetworkSetup, PoolSetup
from ..simulator.simulate import EnoughSeen, simulate
from ..simulator.workload.planned import PlannedRequest
from .cluster import Cluster, narrower
from .demand import Demand
from .goodput import Trial
from .space import Affinity, Placement, PoolChoice

NUM_SHOWN = 32
"""Requests of a timeline."""
_SKIPPED = 0.5  # of the requests that are in the cluster at the limit of the objectives: so many ends are not counted
_SUPPLY = 3.0  # of them: so many requests come beside the counted ones at most


@dataclass(frozen=True, slots=True)
class Case:
    """What is tried: a cluster, what is asked of it, and what counts as good."""

    setup: ClusterSetup
    demand: Demand
    slo: Slo
    num_requests: int

    @property
    def residence(self) -> float:
        """Seconds that a mean request stays when it just meets the objectives."""
        return self.slo.ttft + self.slo.tpot * max(0.0, self.demand.mean_output - 1)


@dataclass(frozen=True, slots=True)
class Observation:
    """A whole trial: what became of the counted requests, and what all workers and links did meanwhile.

    shown  a few requests that came one after the other while the cluster was full, in the order of their arrival
    """

    rate: float
    report: SimulationReport
    shown: tuple[RequestOutcome, ...] = ()


def cluster_setup(placement: Placement, cluster: Cluster, slo: Slo, kv_bytes: float) -> ClusterSetup:
    """The placement as the simulator takes it. kv_bytes: KV of one token, all layers and heads."""
    supplies = [cluster.supply(pool.kind.accelerator) for pool in placement.pools]
    fabric = supplies[0].fabric if len(supplies) == 1 else narrower(supplies[0].fabric, supplies[1].fabric)
    network = NetworkSetup(kv_bytes, fabric.network, fabric.node_link, fabric.latency, fabric.control)
    pools = []
    free = 0  # the next node that nobody uses
    for pool in placement.pools:
        nodes = _nodes(pool, cluster, free) if placement.affinity is Affinity.ANY else (0,) * pool.replicas
        free = max(nodes) + 1
        pools.append(_pool_setup(pool, nodes))
    return ClusterSetup(tuple(pools), network, slo)


def prefill_alone(pool: PoolChoice, cluster: Cluster, demand: Demand, slo: Slo, num_requests: int) -> Case:
    """A pool that prefills and hands over to nobody: what it can do at best."""
    control = cluster.supply(pool.kind.accelerator).fabric.control
    mixed = replace(_pool_setup(pool, ()), role=Role.MIXED)
    firsts = Demand(tuple((prompt, 1) for prompt, _ in demand.mix), demand.burstiness)
    return Case(ClusterSetup((mixed,), NetworkSetup(control=control), slo), firsts, slo, num_requests)


def try_rate(case: Case, rate: float, seed: int, *, complete: bool = False) -> Trial:
    """Simulate until the verdict is certain; with `complete`, until every counted request has ended."""
    counter = _Counter(case, _num_skipped(case, rate), complete)
    simulate(replace(case.setup, seed=seed), _requests(case, rate, seed), sink=counter.take)
    return Trial(rate, seed, counter.attainment, counter.met, counter.num_seen == case.num_requests)


def observe(case: Case, rate: float, seed: int) -> Observation:
    """Simulate until every counted request has ended, and those to be shown, and keep their figures."""
    tally = OutcomeTally(case.slo)
    left = begin = _num_skipped(case, rate)
    shown: list[RequestOutcome] = []

    def count(outcome: RequestOutcome) -> None:
        nonlocal left
        left -= 1
        if begin <= outcome.index < begin + NUM_SHOWN:
            shown.append(outcome)
        if -case.num_requests <= left < 0:
            tally.add(outcome)
        if left <= -case.num_requests and len(shown) == NUM_SHOWN:
            raise EnoughSeen

    result = simulate(replace(case.setup, seed=seed), _requests(case, rate, seed), sink=count)
    shown.sort(key=lambda outcome: outcome.index)
    return Observation(rate, make_report(case.setup, tally, result.duration, result.workers, result.links), tuple(shown))


class _Counter:
    """Counts the outcomes that count. Ends the simulation when it knows enough.

    The later half must meet the target too, but for one standard deviation: a cluster with slightly too much to do gets slower
    and slower, and over all counted ones it could still seem good enough.
    """

    def __init__(self, case: Case, num_skipped: int, complete: bool) -> None:
        target, wanted = case.slo.attainment, case.num_requests
        self._slo = case.slo
        self._skip = num_skipped
        self._wanted = wanted
        self._may_miss = wanted - math.ceil(target * wanted - 1e-9)
        late = wanted - wanted // 2
        self._late_may_miss = math.floor((1 - target) * late + math.sqrt(target * (1 - target) * late) + 1e-9)
        self._complete = complete
        self._num_met = 0
        self._late_missed = 0
        self.num_seen = 0

    def take(self, outcome: RequestOutcome) -> None:
        if self._skip:
            self._skip -= 1
            return
        met = outcome.meets(self._slo)
        self._late_missed += self.num_seen >= self._wanted // 2 and not met
        self.num_seen += 1
        self._num_met += met
        if self.num_seen == self._wanted or ((self.met or self._lost) and not self._complete):
            raise EnoughSeen

    @property
    def met(self) -> bool:
        """Certainly: whatever becomes of those that are still to come."""
        left = self._wanted - self.num_seen
        return self.num_seen - self._num_met + left <= self._may_miss and self._late_missed + left <= self._late_may_miss

    @property
    def _lost(self) -> bool:
        return self.num_seen - self._num_met > self._may_miss or self._late_missed > self._late_may_miss

    @property
    def attainment(self) -> float:
        """Of what was seen."""
        return self._num_met / max(1, self.num_seen)


def _num_skipped(case: Case, rate: float) -> int:
    return math.ceil(_SKIPPED * rate * case.residence)


def _requests(case: Case, rate: float, seed: int) -> Iterator[PlannedRequest]:
    """More than are counted: the cluster is kept full until the verdict."""
    beside = math.ceil(_SUPPLY * rate * case.residence)
    return case.demand.requests(rate, seed, case.num_requests + beside, case.num_requests)


def _pool_setup(pool: PoolChoice, nodes: tuple[int, ...]) -> PoolSetup:
    return PoolSetup(
        role=pool.role,
        cost=pool.kind.cost,
        replicas=pool.replicas,
        num_blocks=pool.kind.num_blocks,
        block_size=pool.kind.block_size,
        max_step_tokens=pool.max_step_tokens,
        max_num_seqs=pool.max_num_seqs,
        overhead=pool.kind.overhead,
        nodes=nodes,
    )


def _nodes(pool: PoolChoice, cluster: Cluster, first: int) -> tuple[int, ...]:
    """The node of each worker's first rank, packed close from node `first` on: two pools share none, so that all KV crosses."""
    supply = cluster.supply(pool.kind.accelerator)
    per_node = max(1, supply.per_node // pool.kind.num_devices)
    return tuple(first + number // per_node for number in range(pool.replicas))
