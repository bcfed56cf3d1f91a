"""Arrivals and lengths."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import pytest
from baton.bench.workload import Length, parse_length, poisson_workload
from baton.core.errors import InvalidRequest

FIXED = Length("fixed", 8, 8)


@pytest.mark.parametrize(
    ("text", "low", "high"), [("512", 512, 512), ("uniform:3,9", 3, 9), ("uniform:5,5", 5, 5), ("exponential:100", 1, 10**6)]
)
def test_lengths_stay_in_their_range_and_print_as_written(text: str, low: int, high: int) -> None:
    length = parse_length(text, "input-len")
    random = Random(0)
    drawn = [length.draw(random) for _ in range(2000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert str(length) == text


def test_distributions_have_the_mean_they_name() -> None:
    random = Random(1)
    exponential = [parse_length("exponential:100", "x").draw(random) for _ in range(4000)]
    uniform = {parse_length("uniform:3,5", "x").draw(random) for _ in range(200)}
    assert 90 < sum(exponential) / len(exponential) < 110
    assert uniform == {3, 4, 5}


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "1.5", "many", "uniform:5", "uniform:9,3", "uniform:0,3", "normal:5", "exponential:"]
)
def test_a_bad_length_names_the_option_and_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"output-len.*uniform:LOW,HIGH") as raised:
        parse_length(text, "output-len")
    assert raised.value.field == "output-len"


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
