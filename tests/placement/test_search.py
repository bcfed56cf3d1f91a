"""The search against trying everything, against itself with other workers, and where there is nothing to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.core.slo import Slo
from baton.core.view import Role
from baton.placement.bounds import goodput_bound
from baton.placement.candidates import affinities, mixed_candidates, split_candidates
from baton.placement.executors import Inline, executor
from baton.placement.goodput import GoodputOptions, find_goodput
from baton.placement.phases import bounded_phases
from baton.placement.problem import Problem, SearchOptions, Status
from baton.placement.search import Progress, case_of, search
from baton.placement.space import CostMaker, Price, fits, mixed_placements, split_placement, worker_kinds
from baton.placement.trial import try_rate
from baton.simulator.cost import LinearCost

MakeProblem = Callable[..., Problem]


def everything(problem: Problem, cost: CostMaker, options: SearchOptions) -> float:
    """The best score of all small placements, without a bound, a guess or an order."""
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    placements = list(mixed_placements(kinds, problem.budgets))
    for prefill in kinds:
        for decode in kinds:
            for affinity in affinities(problem, prefill, decode):
                pairs = [(n, m) for n in range(1, 3) for m in range(1, 3)]
                placements += [split_placement(prefill, decode, pair, affinity, problem.budgets) for pair in pairs]
    scores = []
    for placement in placements:
        if fits(placement, problem.cluster):
            simulate_once = partial(try_rate, case_of(problem, placement, options.num_requests))
            found = find_goodput(simulate_once, 20.0, 1e4, GoodputOptions(options.goodput.seeds[:1], options.goodput.precision))
            bound = goodput_bound(placement, problem.demand, problem.slo, problem.cluster, problem.kv_bytes)
            assert bound > 0 or found.mean == 0
            # Short streams end before a slight overload shows: nothing counts above its long-run bound.
            scores.append(problem.objective.score(placement, min(found.mean, bound)))
    return max(scores)


@pytest.mark.parametrize("seed", range(2))
def test_no_pruned_candidate_beats_the_winner(seed: int, make_problem: MakeProblem) -> None:
    """Random costs, objectives, lengths and links."""
    random = Random(seed)
    step, token, row = random.uniform(1e-3, 8e-3), random.uniform(1e-5, 6e-5), random.uniform(5e-5, 5e-4)
    power = random.uniform(0.5, 1.0)

    def cost(device: object, tp: int, pp: int) -> Price:
        speed = tp**power * pp
        return Price(LinearCost(step, token=token / speed, floor_tokens=16, decode_row=row / speed, stages=pp))

    output = random.randint(3, 14)
    problem = make_problem(
        gpus=("A100-80GB:3",),
        per_node=random.choice((2, 4)),
        slo=Slo(random.uniform(0.05, 0.3), random.uniform(0.012, 0.04), 0.9),
        goal=random.choice(("goodput_per_gpu", "per_watt")),
        network=10 ** random.uniform(7, 10),
        lengths=((200, output), (400, 2 * output), (100, output)),
    )
    options = SearchOptions(num_requests=40, goodput=GoodputOptions((0,), 0.05), slack=0.3)
    found = search(problem, cost, options, Inline())
    best = everything(problem, cost, options)
    if best == 0:
        assert found.best is None
    else:
        assert found.best is not None
        assert found.best.score >= 0.93 * best


def test_the_result_does_not_depend_on_the_workers(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    problem = make_problem(gpus=("A100-80GB:4",))
    here = search(problem, cost, options, Inline())
    with executor(2) as both:
        there = search(problem, cost, options, both)
    assert here == there
    assert here.best is not None


def test_what_a_search_says(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    told: list[Progress] = []
    problem = make_problem(gpus=("A100-80GB:4",))
    result = search(problem, cost, options, Inline(), told.append)
    best = result.best
    assert best is not None
    assert best.thorough
    assert best.goodput is not None
    assert {trial.seed for trial in best.goodput.trials} == {0, 1}
    assert best.rate == best.goodput.low
    assert {"chunked", "colocated", "apart, any nodes", "apart, one node"} == {v.placement.family for v in result.searched}
    assert all(verdict.observation for verdict in result.searched[:2])
    assert all(verdict.score <= best.score for verdict in result.searched)
    assert {cell.status for cell in result.cells} <= set(Status)
    assert told[0].round == "phases"
    assert told[-1].round == "placements"
    assert all(progress.done <= progress.total for progress in told)
    assert result.nearest is None
    assert len(result.verdicts) == len({verdict.placement.name for verdict in result.verdicts})


def test_objectives_that_nothing_meets_have_a_nearest(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    problem = make_problem(slo=Slo(0.001, 0.0005, 0.9))
    result = search(problem, cost, options, Inline())
    assert result.best is None
    assert result.num_simulations == 0
    assert result.nearest is not None
    assert result.nearest.scale > 1
    relaxed = replace(
        problem, slo=replace(result.nearest.slo, ttft=1.5 * result.nearest.slo.ttft, tpot=1.5 * result.nearest.slo.tpot)
    )
    assert search(relaxed, cost, options, Inline()).best is not None


def test_a_model_that_fits_nowhere_is_refused(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    problem = make_problem()
    huge = replace(
        problem,
        need=replace(problem.need, model=replace(problem.need.model, num_layers=1 << 14, hidden_size=1 << 14, name="huge")),
    )
    with pytest.raises(InvalidRequest, match=r"huge .* does not fit on 2 A100-80GB"):
        search(huge, cost, options, Inline())


def test_the_fewest_gpus_for_a_rate(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    problem = make_problem(gpus=("A100-80GB:8",), per_node=8)
    single = search(problem, cost, options, Inline()).best
    assert single is not None
    assert single.goodput is not None
    rate = 2.5 * single.goodput.mean / single.placement.num_devices
    fewest = search(make_problem(gpus=("A100-80GB:8",), per_node=8, goal="fewest_gpus", rate=rate), cost, options, Inline()).best
    assert fewest is not None
    assert 3 <= fewest.placement.num_devices <= 5
    assert fewest.goodput is not None
    assert fewest.goodput.mean >= rate


def test_two_kinds_of_gpu_may_share_the_work(make_problem: MakeProblem, cost: CostMaker) -> None:
    problem = make_problem(gpus=("A100-80GB:2", "H100:2"))
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    phases = bounded_phases(problem, kinds)
    names = {kind.accelerator: kind.name for kind in kinds if kind.num_devices == 1}
    crossed = split_candidates(problem, phases[Role.PREFILL, names["H100"]], phases[Role.DECODE, names["A100-80GB"]])
    assert crossed
    assert {candidate.placement.family for candidate in crossed} == {"apart, any nodes"}
    assert all(fits(candidate.placement, problem.cluster) for candidate in crossed)
    assert {c.placement.family for c in mixed_candidates(problem, kinds, phases)} == {"chunked", "colocated"}
