"""The closed loop that published measurements are compared in: against what can be worked out by hand."""

from __future__ import annotations

import pytest
from baton.simulator.cost import LinearCost
from closed_loop import Engine, closed_loop

COST = LinearCost(step=0.01, token=1e-4)


def test_one_client_never_waits():
    ttft, tpot = closed_loop(Engine(COST, 100_000, request=0.5), 1, 1000, 11, 3)
    assert ttft == pytest.approx(0.5 + 0.01 + 0.1)
    assert tpot == pytest.approx(0.01 + 1e-4)


def test_prompts_first_holds_up_nobody_who_came_together():
    # Two prompts of 1000 share a chunk of 2000; both decode beside each other then, and so on in waves.
    ttft, tpot = closed_loop(Engine(COST, 100_000, chunk=2000, prefill_first=True), 2, 1000, 11, 3)
    assert ttft == pytest.approx(0.01 + 0.2)
    assert tpot == pytest.approx(0.01 + 2e-4)


def test_mixed_steps_stretch_the_tokens_of_those_that_run():
    engine = Engine(COST, 100_000, chunk=1000)
    ttft, tpot = closed_loop(engine, 2, 1000, 11, 1)
    # The second prompt runs beside the first one's row: 999 of its tokens, then the last.
    assert ttft == pytest.approx((0.11 + (0.11 + 0.11 + 0.01 + 2e-4)) / 2)
    assert 0.01 + 2e-4 < tpot < 0.03


def test_who_does_not_fit_in_the_cache_waits_for_a_whole_request():
    ttft, _ = closed_loop(Engine(COST, 1011, chunk=4000), 2, 1000, 11, 1)
    alone = 0.01 + 0.1
    assert ttft == pytest.approx((alone + alone + 10 * (0.01 + 1e-4) + alone) / 2)
