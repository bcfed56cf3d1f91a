"""Arrival processes: rate, burstiness, and common random numbers."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.simulator.workload.arrivals import Arrivals, GammaArrivals, PiecewiseArrivals, PoissonArrivals, ReplayArrivals


def first(arrivals: Arrivals, count: int, seed: int = 0) -> list[float]:
    return list(islice(arrivals.times(Random(seed)), count))


@pytest.mark.parametrize("cv", [0.0, 0.3, 1.0, 3.0])
def test_gaps_have_the_mean_and_the_burstiness_they_name(cv: float) -> None:
    times = [0.0, *first(GammaArrivals(4.0, cv), 20_000)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.06)
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean == pytest.approx(cv, rel=0.06, abs=1e-9)


def test_a_gamma_process_without_burstiness_is_the_poisson_process_itself() -> None:
    assert first(GammaArrivals(4.0), 200) == pytest.approx(first(PoissonArrivals(4.0), 200))


@pytest.mark.parametrize("slow_and_fast", [
    (PoissonArrivals(2.0), PoissonArrivals(20.0)),
    (GammaArrivals(2.0, 2.5), GammaArrivals(20.0, 2.5)),
    (PiecewiseArrivals(((1000.0, 2.0),)), PiecewiseArrivals(((100.0, 20.0),))),
])  # fmt: skip
def test_another_rate_stretches_the_same_arrivals(slow_and_fast: tuple[Arrivals, Arrivals]) -> None:
    slow, fast = (first(arrivals, 100) for arrivals in slow_and_fast)
    assert [at / 10 for at in slow] == pytest.approx(fast)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert first(PoissonArrivals(math.inf), 3) == first(GammaArrivals(math.inf, 2.0), 3) == [0.0] * 3


def test_a_replay_is_the_recording_and_needs_no_luck() -> None:
    replay = ReplayArrivals((0.0, 1.0, 1.0, 5.0), time_scale=0.5)
    assert first(replay, 9) == first(replay, 9, seed=8) == [0.0, 0.5, 0.5, 2.5]
    assert replay.rate is None


def test_a_changing_rate_has_its_arrivals_where_it_is_high() -> None:
    parts = ((100.0, 2.0), (50.0, 0.0), (100.0, 20.0))
    times = list(PiecewiseArrivals(parts).times(Random(5)))
    assert times == sorted(times)
    counts = [sum(begin < at <= end for at in times) for begin, end in ((0, 100), (100, 150), (150, 250))]
    assert counts[1] == 0
    assert counts[0] == pytest.approx(200, rel=0.25)
    assert counts[2] == pytest.approx(2000, rel=0.1)
    assert times[-1] <= 250


def test_a_change_of_rate_that_changes_nothing_changes_nothing() -> None:
    whole, parts = PiecewiseArrivals(((20.0, 3.0),)), PiecewiseArrivals(((5.0, 3.0), (15.0, 3.0)))
    assert list(whole.times(Random(1))) == pytest.approx(list(parts.times(Random(1))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PoissonArrivals(0.0), "rate: 0.0"),
        (lambda: GammaArrivals(-1.0), "rate: -1.0"),
        (lambda: PoissonArrivals(math.nan), "rate: nan"),
        (lambda: GammaArrivals(1.0, -0.5), "burstiness"),
        (lambda: GammaArrivals(1.0, math.inf), "burstiness"),
        (lambda: ReplayArrivals((0.0,), 0.0), "time-scale"),
        (lambda: ReplayArrivals((1.0, 0.0)), "back in time"),
        (lambda: PiecewiseArrivals(()), "nothing would ever arrive"),
        (lambda: PiecewiseArrivals(((5.0, 0.0), (0.0, 5.0))), "nothing would ever arrive"),
        (lambda: PiecewiseArrivals(((5.0, 1.0), (-1.0, 1.0))), "finite numbers, 0 or above"),
        (lambda: PiecewiseArrivals(((math.inf, 1.0),)), "finite numbers, 0 or above"),
    ],
)
def test_what_cannot_arrive_is_refused(make, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        make()
