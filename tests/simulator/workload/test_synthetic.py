"""Arrivals and lengths together."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.simulator.workload.arrivals import PiecewiseArrivals, PoissonArrivals, ReplayArrivals
from baton.simulator.workload.lengths import EmpiricalLengths, IndependentLengths, Length, parse_length
from baton.simulator.workload.synthetic import poisson_workload, synthetic_workload

FIXED = Length("fixed", 8, 8)
PAIR = IndependentLengths(FIXED, FIXED)


def test_the_same_seed_gives_the_same_workload_and_another_seed_another() -> None:
    lengths = parse_length("uniform:10,20", "x"), parse_length("exponential:9", "x")
    first, again, other = (poisson_workload(2.0, *lengths, num_requests=50, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = (
        poisson_workload(rate, parse_length("uniform:1,99", "x"), FIXED, num_requests=30, seed=5) for rate in (0.5, 50.0)
    )
    assert [planned.input_tokens for planned in slow] == [planned.input_tokens for planned in fast]
    assert [planned.at / 100 for planned in slow] == pytest.approx([planned.at for planned in fast])


def test_prompts_do_not_depend_on_the_kind_of_answers() -> None:
    short, long = (
        poisson_workload(1.0, parse_length("uniform:1,99", "x"), parse_length(outputs, "x"), num_requests=30)
        for outputs in ("uniform:1,5", "lognormal:500,2")
    )
    assert [planned.input_tokens for planned in short] == [planned.input_tokens for planned in long]


def test_what_a_seed_means_is_fixed_for_ever() -> None:
    """Published figures name a seed: the same seed must offer the same requests in later versions too."""
    planned = poisson_workload(2.0, parse_length("uniform:10,500", "x"), parse_length("exponential:90", "x"), num_requests=3)
    arrivals, inputs, outputs = Random("0/arrivals"), Random("0/input"), Random("0/output")
    at = 0.0
    for request in planned:
        at += arrivals.expovariate(2.0)
        assert request.at == at
        assert request.input_tokens == inputs.randint(10, 500)
        assert request.output_tokens == max(1, round(outputs.expovariate(1 / 90)))


def test_arrivals_are_poisson_at_the_wanted_rate() -> None:
    workload = poisson_workload(4.0, FIXED, FIXED, duration=2000.0)
    gaps = [later.at - earlier.at for earlier, later in pairwise(workload)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.05)
    # Of an exponential distribution, the standard deviation equals the mean.
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.05)
    assert workload[-1].at <= 2000.0
    assert [planned.index for planned in workload] == list(range(len(workload)))


def test_an_infinite_rate_offers_everything_at_once() -> None:
    assert {planned.at for planned in poisson_workload(math.inf, FIXED, FIXED, num_requests=5)} == {0.0}


def test_number_and_duration_both_end_a_workload() -> None:
    assert len(poisson_workload(10.0, FIXED, FIXED, num_requests=3, duration=100.0)) == 3
    assert len(poisson_workload(10.0, FIXED, FIXED, num_requests=10**9, duration=2.0)) < 60


def test_arrivals_that_end_need_no_other_end() -> None:
    assert [planned.at for planned in synthetic_workload(ReplayArrivals((0.0, 2.0, 3.0)), PAIR)] == [0.0, 2.0, 3.0]
    assert len(list(synthetic_workload(PiecewiseArrivals(((10.0, 5.0),)), PAIR))) > 20


def test_a_workload_without_memory_of_itself() -> None:
    workload = synthetic_workload(PoissonArrivals(1.0), EmpiricalLengths(((3, 4),)), num_requests=10**12)
    assert [(planned.index, planned.input_tokens) for planned in islice(workload, 2)] == [(0, 3), (1, 3)]


@pytest.mark.parametrize(
    ("rate", "num_requests", "duration"),
    [
        (0.0, 5, None),
        (math.nan, 5, None),
        (1.0, None, None),
        (math.inf, None, 5.0),
        (1.0, 0, None),
        (1.0, None, 0.0),
        (0.001, None, 0.1),
    ],
)
def test_an_empty_or_endless_workload_is_refused(rate: float, num_requests: int | None, duration: float | None) -> None:
    with pytest.raises(InvalidRequest):
        poisson_workload(rate, FIXED, FIXED, num_requests=num_requests, duration=duration)
