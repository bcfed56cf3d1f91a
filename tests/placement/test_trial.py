"""Trials with the real simulator: the same answer twice, the same verdict sooner, links and nodes as placed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
from baton.core.view import Role
from baton.placement.problem import Problem
from baton.placement.search import case_of
from baton.placement.space import Affinity, CostMaker, Placement, mixed_placements, split_placement, worker_kinds
from baton.placement.trial import Case, observe, prefill_alone, try_rate

MakeProblem = Callable[..., Problem]


def split(problem: Problem, cost: CostMaker, affinity: Affinity, replicas: tuple[int, int] = (1, 1)) -> Placement:
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    return split_placement(kinds[0], kinds[0], replicas, affinity, problem.budgets)


@pytest.fixture
def case(make_problem: MakeProblem, cost: CostMaker) -> Case:
    problem = make_problem()
    return case_of(problem, split(problem, cost, Affinity.NODE), 60)


def test_a_trial_ends_early_with_the_same_verdict(case: Case) -> None:
    for rate in (5.0, 60.0, 120.0, 400.0):
        early, whole = try_rate(case, rate, 1), try_rate(case, rate, 1, complete=True)
        assert early.met is whole.met
        assert whole.attainment >= 0.9 or not whole.met
        assert whole.complete
    assert try_rate(case, 5.0, 1).met
    assert not try_rate(case, 400.0, 1).met


def test_a_trial_is_repeatable_also_elsewhere(case: Case) -> None:
    copied = pickle.loads(pickle.dumps(case))
    assert try_rate(case, 70.0, 2, complete=True) == try_rate(copied, 70.0, 2, complete=True)


def test_attainment_falls_with_the_rate(case: Case) -> None:
    attainments = [try_rate(case, rate, 0, complete=True).attainment for rate in (5.0, 100.0, 200.0, 400.0)]
    assert attainments == sorted(attainments, reverse=True)
    assert attainments[0] > 0.95 > 0.5 > attainments[-1]


def test_observing_counts_as_many(case: Case) -> None:
    report = observe(case, 50.0, 0).report
    assert report.num_offered == case.num_requests
    assert report.bottleneck.pressures
    assert {pool.role for pool in report.pools} == {"prefill", "decode"}


def test_any_nodes_means_across_the_network(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(gpus=("A100-80GB:8",), network=5e6)
    near = case_of(problem, split(problem, cost, Affinity.NODE), 60)
    far = case_of(problem, split(problem, cost, Affinity.ANY, (3, 2)), 60)
    assert {node for pool in near.setup.pools for node in pool.nodes} == {0}
    assert [pool.nodes for pool in far.setup.pools] == [(0, 0, 1), (2, 2)]
    assert try_rate(near, 20.0, 0).met
    assert not try_rate(far, 20.0, 0).met  # 0.4 s a prompt over the network
    faster = case_of(replace(problem, cluster=problem.cluster.with_link(network=1e12)), split(problem, cost, Affinity.ANY), 60)
    assert try_rate(faster, 20.0, 0).met


def test_prefill_alone_has_no_decode(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem()
    pool = split(problem, cost, Affinity.NODE).pools[0]
    alone = prefill_alone(pool, problem.cluster, problem.demand, problem.slo, 60)
    assert [each.role for each in alone.setup.pools] == [Role.MIXED]
    assert {output for _, output in alone.demand.mix} == {1}
    assert try_rate(alone, 20.0, 0).met


def test_host_overhead_is_felt(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem()
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    quick, slow = (
        case_of(problem, next(mixed_placements([replace(kinds[0], overhead=overhead)], problem.budgets)), 60)
        for overhead in (0.0, 0.018)
    )
    assert try_rate(quick, 10.0, 0).met
    assert not try_rate(slow, 10.0, 0).met
