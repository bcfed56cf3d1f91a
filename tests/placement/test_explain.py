"""Why the winner won: curves, losses in words, the link at which it would lose, what is deployed; and the page that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from baton.core.slo import Slo
from baton.core.view import Role
from baton.deploy.settings import dump_topology, parse_topology
from baton.placement.deployment import deployment_of, topology_of
from baton.placement.executors import Inline
from baton.placement.explain import Explanation, bytes_per_second, explain, find_switch, link_switch, why_lost
from baton.placement.plots import seconds
from baton.placement.problem import Problem, SearchOptions, SearchResult, Status
from baton.placement.report import fullest, nearest_text, plan_page, print_plan, rows, summary_lines
from baton.placement.search import search
from baton.placement.space import Affinity, CostMaker, Price
from baton.placement.trial import NUM_SHOWN
from baton.simulator.cost import LinearCost
from rich.console import Console

MakeProblem = Callable[..., Problem]


def apart_cost(device: object, tp: int, pp: int) -> Price:
    """Steps so long with a prompt in them that decode wants to be left alone."""
    return Price(LinearCost(1e-3, token=4e-5, floor_tokens=8, decode_row=1e-5, stages=pp))


@pytest.fixture(scope="module")
def apart(make_problem: MakeProblem, options: SearchOptions) -> SearchResult:
    problem = make_problem(gpus=("A100-80GB:4",), per_node=2, lengths=((400, 8),), network=1e10)
    problem = replace(problem, slo=replace(problem.slo, tpot=0.006))
    return search(problem, apart_cost, options, Inline())


@pytest.fixture(scope="module")
def explained(apart: SearchResult, options: SearchOptions) -> Explanation:
    explanation = explain(apart, options, Inline())
    assert explanation is not None
    return explanation


def test_what_is_explained(apart: SearchResult, explained: Explanation, options: SearchOptions) -> None:
    best = apart.best
    assert best is not None
    assert best.placement.affinity is not Affinity.NONE
    assert explained.curves[0].placement == best.placement
    for curve in explained.curves:
        assert [rate for rate, _ in curve.points] == sorted(rate for rate, _ in curve.points)
        assert curve.points[0][1] >= curve.points[-1][1]
    assert {loss.verdict.status for loss in explained.losses} >= {Status.SEARCHED, Status.BOUNDED}
    assert all(loss.reason for loss in explained.losses)
    bounded = next(v for v in apart.verdicts if v.status is Status.BOUNDED)
    assert "no schedule can exceed" in why_lost(apart, bounded) or "when they are alone" in why_lost(apart, bounded)


def test_a_thin_link_makes_another_win(make_problem: MakeProblem, options: SearchOptions) -> None:
    problem = make_problem(gpus=("A100-80GB:2",), per_node=1, lengths=((400, 8),), network=1e10)
    problem = replace(problem, slo=replace(problem.slo, tpot=0.006))
    result = search(problem, apart_cost, options, Inline())
    explanation = explain(result, options, Inline())
    assert result.best is not None
    assert result.best.placement.affinity is Affinity.ANY
    assert explanation is not None
    assert explanation.link is not None
    switch = explanation.link
    assert switch.link == "network"
    assert switch.bandwidth is not None
    assert switch.bandwidth < 1e10
    assert "below" in str(switch)
    poor = replace(problem, cluster=problem.cluster.with_link(network=switch.bandwidth / 3))
    other = search(poor, apart_cost, options, Inline()).best
    assert other is not None
    assert other.placement.affinity is not Affinity.ANY


def handed_over(network: float, make_problem: MakeProblem) -> Problem:
    """Two nodes of one GPU, prompts of 400 tokens, one in a step, answers of two: TPOT is the handoff and one decode step."""
    problem = make_problem(gpus=("A100-80GB:2",), slo=Slo(0.6, 0.0333, 0.8), per_node=1, lengths=((400, 2),), network=network)
    return replace(problem, budgets=replace(problem.budgets, prefill_step_tokens=400))


def slow_cost(device: object, tp: int, pp: int) -> Price:
    """A prompt of 400 takes 170 ms, a decode step of a few rows 13.2 ms."""
    return Price(LinearCost(1e-2, token=4e-4, floor_tokens=8, stages=pp))


@pytest.mark.parametrize("network", [1e10, 2e7], ids=["apart wins", "colocated wins"])
def test_the_bandwidth_of_the_switch_is_the_one_worked_out_by_hand(
    network: float, make_problem: MakeProblem, options: SearchOptions
) -> None:
    """Apart, a request waits for nobody but for its KV: TPOT = bytes / bandwidth + latency + 13.2 ms, of which 33.3 are allowed.

    Nine in ten requests meet no other on the link or in the decode worker, and eight in ten need to.
    """
    problem = handed_over(network, make_problem)
    result = search(problem, slow_cost, options, Inline())
    best = result.best
    assert best is not None
    assert (best.placement.affinity is Affinity.ANY) is (network == 1e10)
    switch = link_switch(result, options, Inline())
    assert switch is not None
    assert not switch.tied
    assert switch.bandwidth is not None
    fabric = problem.cluster.supplies[0].fabric
    by_hand = 400 * problem.kv_bytes / (problem.slo.tpot - 0.0132 - fabric.latency)
    assert switch.bandwidth == pytest.approx(by_hand, rel=0.1)
    assert ("below" if network == 1e10 else "above") in str(switch)


def test_a_switch_is_named_only_where_the_winner_changes() -> None:
    threshold = 3e9
    assert find_switch(lambda bandwidth: bandwidth >= threshold, 1e10, True)[0] == pytest.approx(threshold, rel=0.06)
    assert find_switch(lambda bandwidth: bandwidth >= threshold, 1e8, False)[0] == pytest.approx(threshold, rel=0.06)
    # Trials that contradict the search: the two are too close, and what a bisection would find is the bandwidth it began at.
    assert find_switch(lambda bandwidth: True, 6e11, False) == (None, True)
    assert find_switch(lambda bandwidth: False, 6e11, True) == (None, True)
    assert find_switch(lambda bandwidth: False, 6e11, False) == (None, False)
    assert find_switch(lambda bandwidth: True, 6e11, True) == (None, False)


def test_the_topology_is_one_that_is_read(apart: SearchResult, explained: Explanation) -> None:
    text = dump_topology(topology_of(apart.problem, explained.deployment, "planned", "/models/tiny"))
    topology = parse_topology(text, "t.yaml", Path("/")).topology
    best = apart.best
    assert best is not None
    for pool in explained.deployment.cluster_placement.pools:
        spec = topology.pool(pool.role)
        assert spec is not None
        assert (spec.tensor_parallel, spec.pipeline_parallel) == (pool.kind.tp, pool.kind.pp)
        assert (spec.replicas, spec.accelerator) == (pool.replicas, "A100-80GB")
        per_token = apart.problem.need.model.rank_kv_bytes_per_token(pool.kind.tp, pool.kind.pp)
        assert spec.kv_memory_bytes == pytest.approx(pool.kind.kv_tokens * per_token, rel=0.01)
    assert topology.slo == apart.problem.slo
    assert topology.pool(Role.MIXED) is None


def test_copies_for_a_rate(apart: SearchResult) -> None:
    best = apart.best
    assert best is not None
    assert best.goodput is not None
    everything = deployment_of(apart.problem, best)
    assert everything.num_devices + dict(everything.spare)["A100-80GB"] == 4
    for share, suffices in ((0.4, True), (0.9, True), (1.2, False)):
        wanted = share * everything.rate
        problem = replace(apart.problem, objective=replace(apart.problem.objective, rate=wanted))
        deployment = deployment_of(problem, best)
        assert deployment.suffices is suffices
        assert deployment.rate >= wanted or not suffices
        if best.placement.affinity is Affinity.NODE:
            assert deployment.cluster_placement.num_devices <= 2


class _Page(HTMLParser):
    """Collects what a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_stands_alone(apart: SearchResult, explained: Explanation) -> None:
    text = plan_page(apart, explained, "cluster: <planned>")
    page = _Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 4
    assert "Requests/s per GPU against TTFT" in text
    best = apart.best
    assert best is not None
    assert best.observation is not None
    assert len(best.observation.shown) == NUM_SHOWN
    assert [each.arrival for each in best.observation.shown] == sorted(each.arrival for each in best.observation.shown)
    assert text.count("decode ") >= NUM_SHOWN / 2  # a bar of each that decodes for some time
    assert "cluster: &lt;planned&gt;" in text
    for verdict in apart.searched[:3]:
        assert verdict.placement.name.replace("A100-80GB ", "") in text


def test_the_table(apart: SearchResult, explained: Explanation) -> None:
    console = Console(width=140, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        print_plan(console, apart, explained)
    text = capture.get()
    best = apart.best
    assert best is not None
    assert "requests/s per GPU" in text
    assert f"best    {best.placement.name}"[:30].split()[0] in text
    assert [row.best for row in rows(apart)].count(True) == 1
    assert {"best", "binds", "deploy", "tried"} <= {name for name, _ in summary_lines(apart, explained)}


def test_what_carries_more_in_all_is_named(apart: SearchResult, explained: Explanation) -> None:
    """The best per GPU may leave GPUs idle."""
    deployment = explained.deployment
    fuller = fullest(apart, deployment)
    most = max(deployment_of(apart.problem, verdict).rate for verdict in apart.searched)
    assert (fuller is not None) is (most > 1.05 * deployment.rate)
    small = replace(deployment, rate=most / 1.2)
    found = fullest(apart, small)
    assert found is not None
    assert found[1].rate == most
    assert "more in all" in dict(summary_lines(apart, replace(explained, deployment=small)))
    assert fullest(apart, replace(small, wanted=1.0)) is None


def test_nothing_to_explain(make_problem: MakeProblem, cost: CostMaker, options: SearchOptions) -> None:
    problem = make_problem()
    problem = replace(problem, slo=replace(problem.slo, ttft=1e-4))
    result = search(problem, cost, options, Inline())
    assert explain(result, options, Inline()) is None
    assert result.nearest is not None
    near = result.nearest.slo
    assert near.tpot == problem.slo.tpot  # only TTFT was out of reach
    assert near.ttft > problem.slo.ttft
    words = nearest_text(result.nearest, problem.slo)
    assert "nearest that can be reached" in words
    assert f"TTFT {seconds(near.ttft)} ({near.ttft / 1e-4:.3g} times what was asked for) and TPOT 20 ms (as asked for)" in words


def test_bandwidths_are_readable() -> None:
    assert [bytes_per_second(rate) for rate in (12, 3.4e9, 2e12)] == ["12 B/s", "3.4 GB/s", "2 TB/s"]
