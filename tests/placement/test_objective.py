"""Scores grow with goodput, and a rate to beat is where they meet."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from baton.core.errors import InvalidRequest
from baton.placement.objective import OBJECTIVES, objective
from baton.placement.problem import Problem
from baton.placement.space import Affinity, CostMaker, split_placement, worker_kinds

MakeProblem = Callable[..., Problem]


@pytest.mark.parametrize("goal", [name for name in OBJECTIVES if name != "fewest_gpus"])
def test_the_rate_to_beat_scores_as_much(goal: str, make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(gpus=("A100-80GB:2", "H100:2"), goal=goal)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    placement = split_placement(kinds[0], kinds[-1], (1, 1), Affinity.ANY, problem.budgets)
    score = problem.objective.score(placement, 3.0)
    assert problem.objective.rate_to_beat(placement, score) == pytest.approx(3.0)
    assert problem.objective.score(placement, 6.0) == pytest.approx(2 * score)


def test_what_is_divided_by(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(gpus=("A100-80GB:2", "H100:2"))
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    pair = split_placement(kinds[0], kinds[-1], (1, 1), Affinity.ANY, problem.budgets)
    slow, fast = (problem.cluster.supply(pool.kind.accelerator).accelerator for pool in pair.pools)
    sizes = [pool.num_devices for pool in pair.pools]
    assert problem.objective.cost(pair) == sum(sizes)
    watts = objective("per_watt", problem.cluster).cost(pair)
    assert watts == pytest.approx(sizes[0] * slow.watts + sizes[1] * fast.watts)
    dollars = objective("per_dollar", problem.cluster).cost(pair)
    assert dollars == pytest.approx((sizes[0] * slow.price + sizes[1] * fast.price) / 3600)


def test_the_fewest_gpus_that_carry_a_rate(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(goal="fewest_gpus", rate=5.0)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    pair = split_placement(kinds[0], kinds[0], (1, 1), Affinity.NODE, problem.budgets)
    assert problem.objective.score(pair, 4.9) == 0.0
    assert problem.objective.score(pair, 5.0) == 0.5
    assert problem.objective.rate_to_beat(pair, 0.5) == 5.0
    assert problem.objective.rate_to_beat(pair, 0.51) == math.inf


def test_bad_goals_are_named(make_problem: MakeProblem) -> None:
    cluster = make_problem().cluster
    with pytest.raises(InvalidRequest, match="--objective: 'fame' is unknown; allowed are goodput_per_gpu"):
        objective("fame", cluster)
    with pytest.raises(InvalidRequest, match="needs --rate"):
        objective("fewest_gpus", cluster)
    with pytest.raises(InvalidRequest, match="--rate: -1"):
        objective("per_watt", cluster, -1.0)
