"""From what a cluster remembers to a demand and to step times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from baton.core.errors import Unavailable
from baton.core.observed import ObservedRequest, ObservedStep
from baton.core.shape import StepShape
from baton.core.slo import Slo
from baton.placement.hardware import find_accelerator
from baton.placement.model_shape import ModelShape
from baton.placement.observed import MIN_REQUESTS, MIN_STEPS, PRIOR_ERROR, Build, StepTimesSeen, workload_of
from baton.placement.roofline import roofline_cost
from baton.simulator.cost import LinearCost

SLO = Slo(1.0, 0.1, 0.9)
MODEL = ModelShape("tiny", 4, 512, 1024, 8, 8, 64, 1000, 4096)
DEVICE = find_accelerator("A100-80GB")
ONE, TWO = Build(DEVICE, 1, 1), Build(DEVICE, 2, 1)


def requests(count: int, rate: float, shape: float = 1.0, until: float = -5.0) -> list[ObservedRequest]:
    """`count` requests whose gaps are Gamma distributed (shape 1: Poisson), the last one `-until` seconds ago."""
    random = Random(7)
    arrivals, at = [], until
    for _ in range(count):
        arrivals.append(at)
        at -= random.gammavariate(shape, 1 / shape) / rate
    return [ObservedRequest(at, 100, 20, 25, True, 0.2, 0.05) for at in arrivals]


@pytest.mark.parametrize(("shape", "spread"), [(1.0, 1.0), (0.25, 2.0), (16.0, 0.25)])
def test_rate_and_burstiness(shape: float, spread: float) -> None:
    workload = workload_of(requests(4000, 8.0, shape), SLO)
    assert workload.rate == pytest.approx(8.0, rel=0.07)
    assert workload.demand.burstiness == pytest.approx(spread, rel=0.12)
    assert workload.num_requests == 4000
    assert workload.cached == pytest.approx(0.25)
    assert workload.since_last == pytest.approx(5.0)
    assert (workload.demand.mean_input, workload.demand.mean_output) == (100, 20)
    assert (workload.ttft, workload.tpot) == (0.2, 0.05)


def test_the_order_of_ends_does_not_matter() -> None:
    some = requests(500, 8.0)
    Random(3).shuffle(some)
    assert workload_of(some, SLO) == workload_of(requests(500, 8.0), SLO)


def test_what_was_refused_was_wanted_too() -> None:
    """It counts for the rate and the attainment, and says nothing of lengths."""
    some = requests(400, 8.0)
    mixed = [
        replace(each, ok=False, output_tokens=0, ttft=None, tpot=None) if i % 4 == 0 else each for i, each in enumerate(some)
    ]
    workload = workload_of(mixed, SLO)
    assert workload.rate == workload_of(some, SLO).rate
    assert workload.attainment == pytest.approx(0.75)
    assert workload.demand.mean_output == 20
    late = [replace(each, tpot=0.2) for each in some]
    assert workload_of(late, SLO).attainment == 0.0


def test_sequences_of_one_request_come_together() -> None:
    """n=2: twice the rate, and no gaps of zero that would look like bursts."""
    some = requests(1000, 8.0)
    workload = workload_of([each for each in some for _ in range(2)], SLO)
    assert workload.rate == pytest.approx(2 * workload_of(some, SLO).rate)
    assert workload.demand.burstiness == workload_of(some, SLO).demand.burstiness


def test_only_what_came_since_the_last_pause_counts() -> None:
    old, new = requests(300, 2.0, until=-4000.0), requests(300, 10.0)
    workload = workload_of([*old, *new], SLO)
    assert workload.num_requests == 300
    assert workload.rate == pytest.approx(10.0, rel=0.2)
    slow = requests(300, 0.05)  # one in 20 s: gaps of two minutes are part of it
    assert workload_of(slow, SLO).num_requests == 300


@pytest.mark.parametrize("count", [0, 1, MIN_REQUESTS - 1])
def test_too_few_requests(count: int) -> None:
    with pytest.raises(Unavailable, match=f"ended {count} requests well; at least {MIN_REQUESTS} are needed"):
        workload_of(requests(count, 1.0), SLO)


def test_too_few_since_the_last_pause() -> None:
    with pytest.raises(Unavailable, match=r"20 requests well since its last pause \(320 before and after it\)"):
        workload_of([*requests(300, 1.0, until=-4000.0), *requests(20, 1.0)], SLO)


def test_all_at_once_has_no_rate() -> None:
    with pytest.raises(Unavailable, match="at the same moment"):
        workload_of([ObservedRequest(-1.0, 10, 5, 0, True, 0.1, 0.01)] * 200, SLO)


# ---- step times


def prefill(tokens: int) -> StepShape:
    return StepShape(1, tokens, tokens * (tokens + 1) // 2, tokens, sampled=1)


def decode(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=rows * context, sampled=rows)


TRUE = LinearCost(4e-3, token=3e-5, floor_tokens=32, pair=2e-8, decode_context=4e-7, decode_row=5e-5)


def seen(shapes: Sequence[StepShape], cost: LinearCost = TRUE, overhead: float = 1e-3) -> list[ObservedStep]:
    random = Random(1)
    return [
        ObservedStep(shape, seconds := cost.seconds(shape) * random.uniform(0.98, 1.02), seconds + overhead) for shape in shapes
    ]


PROMPTS = [prefill(tokens) for tokens in range(40, 840, 20)]
BATCHES = [decode(rows, context) for rows in range(1, 11) for context in (100, 200, 400, 800)]


def test_steps_give_their_cost_back() -> None:
    found = StepTimesSeen(MODEL, "bfloat16", {ONE: seen([*PROMPTS, *BATCHES])}).cost(ONE)
    assert found.num_steps == 80
    assert found.error < 0.08
    assert found.overhead == pytest.approx(1e-3)
    for shape in (prefill(100), prefill(700), decode(2, 300), decode(10, 700)):
        assert found.cost.seconds(shape) == pytest.approx(TRUE.seconds(shape), rel=0.12)


def test_a_hiccup_is_no_cost() -> None:
    steps = seen([*PROMPTS, *BATCHES])
    hiccups = [replace(step, seconds=step.seconds * 30) if number % 20 == 3 else step for number, step in enumerate(steps)]
    clean = StepTimesSeen(MODEL, "bfloat16", {ONE: steps}).cost(ONE).cost
    cost = StepTimesSeen(MODEL, "bfloat16", {ONE: hiccups}).cost(ONE).cost
    for shape in (prefill(400), decode(8, 400)):
        assert cost.seconds(shape) == pytest.approx(clean.seconds(shape), rel=0.15)


def test_sizes_that_never_came_follow_the_roofline() -> None:
    """Ten rows at one context say nothing of 64 rows: those must not come for free."""
    steps = seen([*[prefill(256)] * 20, *[decode(10, 200)] * 20])
    cost = StepTimesSeen(MODEL, "bfloat16", {ONE: steps}).cost(ONE).cost
    prior = roofline_cost(MODEL, DEVICE)
    scale = TRUE.seconds(decode(10, 200)) / prior.seconds(decode(10, 200))
    assert cost.seconds(decode(64, 1024)) == pytest.approx(scale * prior.seconds(decode(64, 1024)), rel=0.5)
    assert cost.seconds(decode(64, 1024)) > 1.2 * cost.seconds(decode(10, 200))


def test_another_parallelism_has_the_same_scale() -> None:
    prior = roofline_cost(MODEL, DEVICE)
    slow = [ObservedStep(shape, 3 * prior.seconds(shape), 3 * prior.seconds(shape)) for shape in (*PROMPTS, *BATCHES)]
    found = StepTimesSeen(MODEL, "bfloat16", {ONE: slow}).cost(TWO)
    assert (found.num_steps, found.error) == (0, PRIOR_ERROR)
    wide = roofline_cost(MODEL, DEVICE, 2)
    for shape in (prefill(1024), decode(16, 1024)):
        assert found.cost.seconds(shape) == pytest.approx(3 * wide.seconds(shape), rel=0.3)


def test_a_phase_that_a_build_never_ran_is_uncertain() -> None:
    """A prefill pool of TP2 and a decode pool of TP1: neither knows what the other's steps cost."""
    times = StepTimesSeen(MODEL, "bfloat16", {TWO: seen(PROMPTS), ONE: seen(BATCHES)})
    for build in (ONE, TWO):
        assert times.cost(build).error == PRIOR_ERROR
        assert times.cost(build).cost.seconds(decode(32, 512)) > times.cost(build).cost.seconds(decode(1, 512))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [(BATCHES, "remembers 0 steps with prompts"), ([*PROMPTS, decode(1, 9)], "remembers 1 steps that only decode")],
)
def test_too_few_steps(shapes: list[StepShape], words: str) -> None:
    with pytest.raises(Unavailable, match=f"{words}; at least {MIN_STEPS} are needed"):
        StepTimesSeen(MODEL, "bfloat16", {ONE: seen(shapes)})


def test_a_pipeline_is_seen_whole() -> None:
    piped = Build(DEVICE, 1, 2)
    times = StepTimesSeen(MODEL, "bfloat16", {piped: seen([*PROMPTS, *BATCHES])})
    cost = times.cost(piped).cost
    assert cost.stages == 2
    assert cost.seconds(decode(8, 400)) == pytest.approx(TRUE.seconds(decode(8, 400)) / 2, rel=0.15)
