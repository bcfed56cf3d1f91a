"""Goodput of systems whose answer is known: the search must find it, in few trials."""

from __future__ import annotations

import math

import pytest
from baton.placement.goodput import Goodput, GoodputOptions, Trial, find_goodput, together
from hypothesis import given
from hypothesis import strategies as st


def system(limits: dict[int, float]):
    def simulate_once(rate: float, seed: int) -> Trial:
        return Trial(rate, seed, min(1.0, limits[seed] / rate), rate <= limits[seed])

    return simulate_once


@given(st.floats(1e-2, 1e3), st.floats(0.05, 20.0))
def test_finds_the_limit_from_any_guess(limit: float, guess: float) -> None:
    found = find_goodput(system({0: limit}), guess * limit, math.inf, GoodputOptions((0,), 0.02))
    assert found.mean == pytest.approx(limit, rel=0.0202)
    assert len(found.trials) <= 20


@given(st.lists(st.floats(0.8, 1.2), min_size=3, max_size=3))
def test_every_seed_has_its_own_and_the_interval_shows_them(limits: list[float]) -> None:
    found = find_goodput(system(dict(enumerate(limits))), 1.0, math.inf, GoodputOptions((0, 1, 2), 0.01))
    assert found.low == pytest.approx(min(limits), rel=0.011)
    assert found.high == pytest.approx(max(limits), rel=0.011)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(sum(limits) / 3, rel=0.011)


def test_a_bound_is_never_passed() -> None:
    found = find_goodput(system({0: 50.0}), 9.0, 10.0, GoodputOptions((0,), 0.02))
    assert found.mean <= 10.0
    assert all(trial.rate <= 10.0 for trial in found.trials)


def test_nothing_is_simulated_beneath_a_bound_of_zero() -> None:
    assert find_goodput(system({0: 5.0}), 1.0, 0.0, GoodputOptions((0,))).trials == ()


def test_a_system_that_never_meets_has_none() -> None:
    found = find_goodput(system({0: 0.0}), 3.0, math.inf, GoodputOptions((0,)))
    assert (found.mean, found.low, found.high) == (0.0, 0.0, 0.0)


def test_a_trial_that_is_known_is_not_run_again() -> None:
    known = Trial(4.0, 0, 1.0, True)
    found = find_goodput(system({0: 5.0}), 1.0, 5.05, GoodputOptions((0,), 0.3), reached=known)
    assert found.trials == (known,)
    assert 4.0 <= found.mean <= 5.05


def test_a_queue_with_a_closed_form() -> None:
    """M/D/1 with service D: the mean wait R D^2 / (2 (1 - R D)) meets W up to R = 2 W / (D^2 + 2 W D)."""
    service, wait = 0.1, 0.2

    def simulate_once(rate: float, seed: int) -> Trial:
        met = rate * service < 1 and rate * service**2 / (2 * (1 - rate * service)) <= wait
        return Trial(rate, seed, float(met), met)

    exact = 2 * wait / (service**2 + 2 * wait * service)
    assert find_goodput(simulate_once, 3.0, 1 / service, GoodputOptions((0,), 0.01)).mean == pytest.approx(exact, rel=0.01)


def test_seeds_that_were_searched_apart_come_together() -> None:
    first, second = Goodput(2.0, 2.0, 2.0, (Trial(2.0, 0, 0.9, True),)), Goodput(3.0, 3.0, 3.0, (Trial(3.0, 1, 0.9, True),))
    both = together([first, second])
    assert (both.mean, both.low, both.high) == (2.5, 2.0, 3.0)
    assert [trial.seed for trial in both.trials] == [0, 1]
    half = both.times(0.5)
    assert (half.mean, half.low, half.high, half.trials) == (1.25, 1.0, 1.5, both.trials)
