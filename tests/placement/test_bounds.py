"""Bounds are safe: no long simulation surpasses them, and a search that prunes by them finds what trying everything finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from baton.core.slo import Slo
from baton.placement.bounds import (
    decode_bound,
    decode_estimate,
    goodput_bound,
    lone,
    lone_attainment,
    mixed_bound,
    nearest_scale,
    num_nodes,
    prefill_bound,
)
from baton.placement.problem import Problem
from baton.placement.search import case_of
from baton.placement.space import Affinity, CostMaker, Price, mixed_placements, split_placement, worker_kinds
from baton.placement.trial import try_rate
from baton.simulator.cost import LinearCost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MakeProblem = Callable[..., Problem]


def test_a_worker_without_fixed_cost_has_the_obvious_bounds(make_problem: MakeProblem) -> None:
    problem = make_problem(lengths=((100, 11),), slo=Slo(1.0, 0.05))
    line = LinearCost(step=1e-9, token=1e-3, decode_row=1e-3)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, lambda *_: Price(line))
    prefill, decode = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets).pools
    assert prefill_bound(prefill, problem.demand) == pytest.approx(10.0, rel=0.05)  # 0.1 s a prompt
    assert decode_bound(decode, problem.demand, problem.slo) == pytest.approx(50.0, rel=0.05)  # 10 tokens of 2 ms
    assert decode_estimate(decode, problem.demand, problem.slo) == pytest.approx(50.0, rel=0.05)
    mixed = next(mixed_placements(kinds[:1], problem.budgets)).pools[0]
    assert 1 / 0.12 <= mixed_bound(mixed, problem.demand) <= 1.15 / 0.12


def test_tpot_bounds_the_batch(make_problem: MakeProblem) -> None:
    """Steps of 10 ms + 1 ms a row, TPOT 20 ms: 10 rows at most on average, 500 tokens/s."""
    problem = make_problem(lengths=((100, 11),), slo=Slo(1.0, 0.02, 1.0))
    line = LinearCost(step=1e-2, decode_row=1e-3)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, lambda *_: Price(line))
    decode = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets).pools[1]
    assert decode_estimate(decode, problem.demand, problem.slo) == pytest.approx(50.0)
    assert 50.0 <= decode_bound(decode, problem.demand, problem.slo) <= 55.0
    narrow = replace(decode, kind=replace(decode.kind, num_blocks=15))  # room for 4 sequences
    assert decode_bound(narrow, problem.demand, problem.slo) < 40.0


def test_lone_requests_that_miss_make_the_bound_zero(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(slo=Slo(0.001, 0.02))
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    placement = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets)
    assert goodput_bound(placement, problem.demand, problem.slo, problem.cluster, problem.kv_bytes) == 0.0
    alone = lone(placement, problem.demand)
    scale = nearest_scale(alone, problem.slo)
    assert scale > 1
    assert lone_attainment(alone, Slo(0.001 * scale * 1.001, 0.02 * scale)) >= 0.9
    assert lone_attainment(alone, Slo(0.001 * scale * 0.999, 0.02 * scale)) < 0.9


def test_links_bound_too(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(gpus=("A100-80GB:8",), network=1e7, lengths=((100, 5),))
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    placement = split_placement(kinds[0], kinds[0], (3, 1), Affinity.ANY, problem.budgets)
    assert num_nodes(placement.pools[0], problem.cluster) == 2
    bound = goodput_bound(placement, problem.demand, problem.slo, problem.cluster, problem.kv_bytes)
    assert bound == pytest.approx(2 * 1e7 / (100 * problem.kv_bytes))


def test_answers_of_one_token_need_no_decode(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(lengths=((100, 1),))
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    pool = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets).pools[1]
    assert decode_bound(pool, problem.demand, problem.slo) == math.inf


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    step=st.floats(8e-3, 2e-2),
    token=st.floats(5e-5, 3e-4),
    row=st.floats(3e-4, 2e-3),
    stages=st.sampled_from((1, 2)),
    tpot=st.floats(0.03, 0.06),
    output=st.integers(2, 12),
    mixed=st.booleans(),
)
def test_no_long_run_surpasses_its_bound(
    make_problem: MakeProblem, step: float, token: float, row: float, stages: int, tpot: float, output: int, mixed: bool
) -> None:
    """At 1.15 times the bound a long stream misses its objectives."""
    lengths = ((50, output), (300, 2 * output), (150, 1 + output // 2))
    problem = make_problem(lengths=lengths, slo=Slo(0.3, tpot, 0.9), gpus=("A100-80GB:4",), per_node=4)
    line = LinearCost(step, token=token, floor_tokens=20, decode_row=row, pair=1e-9, stages=stages)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, lambda *_: Price(line))
    if mixed:
        placement = next(mixed_placements(kinds[:1], problem.budgets))
    else:
        placement = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets)
    bound = goodput_bound(placement, problem.demand, problem.slo, problem.cluster, problem.kv_bytes)
    if bound > 0:
        num_requests = 150 + math.ceil(8 * 1.15 * bound * problem.slo.ttft)  # time for the queue to pass TTFT
        assert not try_rate(case_of(problem, placement, num_requests), 1.15 * bound, 0).met
