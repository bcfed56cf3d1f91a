"""Common random numbers: a seed's requests are the same at every rate; blocks hold their share of the mix."""

from __future__ import annotations

from itertools import pairwise

import pytest
from baton.core.errors import InvalidRequest
from baton.placement.demand import MAX_MIX, demand_of
from hypothesis import given
from hypothesis import strategies as st

MIX = [(10 * number, 1 + number % 7) for number in range(1, 500)]


@given(st.floats(0.01, 100), st.integers(0, 5))
def test_a_rate_only_stretches_time(rate: float, seed: int) -> None:
    demand = demand_of(MIX)
    slow, fast = (list(demand.requests(each, seed, 70, 50)) for each in (1.0, rate))
    assert [(r.index, r.input_tokens, r.output_tokens) for r in slow] == [
        (r.index, r.input_tokens, r.output_tokens) for r in fast
    ]
    assert [r.at for r in fast] == pytest.approx([r.at / rate for r in slow])
    assert len(slow) == 70


def test_a_block_takes_its_time_and_has_the_means_of_the_mix() -> None:
    demand = demand_of(MIX)
    block = list(demand.requests(2.0, 3, 100, 100))
    assert block[-1].at == pytest.approx(50.0)
    assert sum(r.input_tokens for r in block) / 100 == pytest.approx(demand.mean_input, rel=0.02)
    assert sum(r.output_tokens for r in block) / 100 == pytest.approx(demand.mean_output, rel=0.05)
    assert block != list(demand.requests(2.0, 4, 100, 100))


def test_bursts_come_in_bursts() -> None:
    gaps = {}
    for burstiness in (0.5, 1.0, 3.0):
        times = [r.at for r in demand_of(MIX, burstiness).requests(1.0, 0, 2000, 2000)]
        steps = [late - early for early, late in pairwise(times)]
        mean = sum(steps) / len(steps)
        gaps[burstiness] = (sum((step - mean) ** 2 for step in steps) / len(steps)) ** 0.5 / mean
    assert gaps[0.5] == pytest.approx(0.5, rel=0.2)
    assert gaps[1.0] == pytest.approx(1.0, rel=0.2)
    assert gaps[3.0] > 2


def test_long_traces_are_thinned_fairly() -> None:
    pairs = [(1 + number % 1000, 1 + number % 13) for number in range(20_000)]
    demand = demand_of(pairs)
    assert len(demand.mix) == MAX_MIX
    assert demand.mean_input == pytest.approx(500.5, rel=0.02)


def test_an_empty_workload_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="holds no request"):
        demand_of([])
    with pytest.raises(InvalidRequest, match="burstiness: 0"):
        demand_of([(1, 1)], 0.0)
