"""From kinds of workers to placements: in which proportions, with which affinity, and what their phases promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

from ..core.view import Role
from .bounds import goodput_bound, link_bound
from .objective import FEWEST
from .problem import Candidate, Phase, Problem
from .space import Affinity, Placement, WorkerKind, fits, mixed_placements, split_placement

MAX_PART = 4
_LARGE_PARTS = (6, 8, 12)
_MAX_NODES = 2  # that a placement of several workers may fill before it is multiplied
_PER_PAIR = 2  # proportions of one pair of kinds that are worth a look

PROPORTIONS = tuple(
    (prefill, decode) for prefill in range(1, MAX_PART + 1) for decode in range(1, MAX_PART + 1) if math.gcd(prefill, decode) == 1
) + tuple(pair for large in _LARGE_PARTS for pair in ((large, 1), (1, large)))
"""Replicas of prefill and decode workers of the smallest cluster with that proportion: what `copies_that_fit` multiplies."""


def split_candidates(problem: Problem, prefill: Phase, decode: Phase) -> list[Candidate]:
    """The most promising placements of one prefill and one decode kind, best first, of each affinity; those that fit."""
    candidates: list[Candidate] = []
    for affinity in affinities(problem, prefill.kind, decode.kind):
        found = [
            _split(problem, placement, prefill.rate, decode.rate)
            for replicas in _proportions(problem, prefill, decode)
            if fits(placement := split_placement(prefill.kind, decode.kind, replicas, affinity, problem.budgets), problem.cluster)
        ]
        found.sort(key=lambda candidate: rank(problem, candidate))
        candidates += found[:_PER_PAIR]
    return candidates


def mixed_candidates(
    problem: Problem, kinds: Iterable[WorkerKind], phases: Mapping[tuple[Role, str], Phase]
) -> Iterator[Candidate]:
    """The baselines. A worker that does both shares its time: that is the estimate; the bound knows better tricks."""
    for placement in mixed_placements(kinds, problem.budgets):
        name = placement.pools[0].kind.name
        rates = [phases[role, name].rate for role in (Role.PREFILL, Role.DECODE)]
        shared = 1 / sum(1 / rate for rate in rates) if min(rates) > 0 else 0.0
        for copies in _copies(problem, placement, shared):
            large = placement.times(copies)
            if fits(large, problem.cluster):
                bound = goodput_bound(large, problem.demand, problem.slo, problem.cluster, problem.kv_bytes)
                yield Candidate(large, bound, min(copies * shared, bound))


def with_bound(problem: Problem, candidate: Candidate) -> Candidate:
    """The same with the bound of its whole, which takes longer to compute than its parts'."""
    bound = goodput_bound(candidate.placement, problem.demand, problem.slo, problem.cluster, problem.kv_bytes)
    return Candidate(candidate.placement, bound, min(candidate.estimate, bound))


def rank(problem: Problem, candidate: Candidate) -> tuple[float, float, int, str]:
    """Sorts candidates: the best promise first, ties by what they promise per GPU, then fewer GPUs, then by name."""
    placement = candidate.placement
    score = problem.objective.score(placement, candidate.estimate)
    return (-score, -candidate.estimate / placement.num_devices, placement.num_devices, placement.name)


def affinities(problem: Problem, prefill: WorkerKind, decode: WorkerKind) -> tuple[Affinity, ...]:
    """Nodes hold one kind of device: only workers of one kind can share one. On a single node nothing else is to be had."""
    if prefill.accelerator != decode.accelerator:
        return (Affinity.ANY,)
    if problem.cluster.supply(prefill.accelerator).num_nodes == 1:
        return (Affinity.NODE,)
    return (Affinity.NODE, Affinity.ANY)


def _split(problem: Problem, placement: Placement, prefill_rate: float, decode_rate: float) -> Candidate:
    prefill, decode = placement.pools
    link = link_bound(placement, problem.demand, problem.cluster, problem.kv_bytes)
    estimate = min(prefill.replicas * prefill_rate, decode.replicas * decode_rate, link)
    return Candidate(placement, link, estimate)


def _proportions(problem: Problem, prefill: Phase, decode: Phase) -> Iterable[tuple[int, int]]:
    """Those of small clusters: a large one is several of them, and takes as many times longer to simulate.

    For a rate, the replicas that carry it and their neighbours: pools queue less than single workers, or more together.
    """
    if problem.objective.name != FEWEST:
        first, second = prefill.kind.num_devices, decode.kind.num_devices
        per_node = max(problem.cluster.supply(kind.accelerator).per_node for kind in (prefill.kind, decode.kind))
        most = max(_MAX_NODES * per_node, first + second)
        return [pair for pair in PROPORTIONS if pair[0] * first + pair[1] * second <= most]
    rate = problem.objective.rate or 0.0
    if min(prefill.rate, decode.rate) <= 0:
        return ()
    least = (math.ceil(rate / prefill.rate), math.ceil(rate / decode.rate))
    return [
        (first, second)
        for first in range(max(1, least[0] - 1), least[0] + 2)
        for second in range(max(1, least[1] - 1), least[1] + 2)
    ]


def _copies(problem: Problem, placement: Placement, rate: float) -> Iterable[int]:
    if problem.objective.name != FEWEST:
        return (1,)
    if rate <= 0:
        return ()
    least = math.ceil((problem.objective.rate or 0.0) / rate)
    return range(max(1, least - 1), least + 2)
