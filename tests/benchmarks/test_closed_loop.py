"""The closed loop that published measurements are compared in: against what can be worked out by hand."""

from __future__ import annotations

import pytest
from baton.simulator.cost import LinearCost
from closed_loop import KEPT_APART, Engine, Load, closed_loop

COST = LinearCost(step=0.01, token=1e-4)


def test_one_client_never_waits() -> None:
    ttft, tpot = closed_loop(Engine(COST, 100_000, request=0.5), Load(1, 1000, 11, 3))
    assert ttft == pytest.approx(0.5 + 0.01 + 0.1)
    assert tpot == pytest.approx(0.01 + 1e-4)


def test_prompts_first_holds_up_nobody_who_came_together() -> None:
    # Two prompts of 1000 share a chunk of 2000; both decode beside each other then, and so on in waves.
    ttft, tpot = closed_loop(Engine(COST, 100_000, chunk=2000, prefill_first=True), Load(2, 1000, 11, 3))
    assert ttft == pytest.approx(0.01 + 0.2)
    assert tpot == pytest.approx(0.01 + 2e-4)


def test_mixed_steps_stretch_the_tokens_of_those_that_run() -> None:
    ttft, tpot = closed_loop(Engine(COST, 100_000, chunk=1000), Load(2, 1000, 11, 1))
    # The second prompt runs beside the first one's row: 999 of its tokens, then the last.
    assert ttft == pytest.approx((0.11 + (0.11 + 0.11 + 0.01 + 2e-4)) / 2)
    assert 0.01 + 2e-4 < tpot < 0.03


def test_a_whole_prompt_waits_for_a_step_that_has_room_for_it() -> None:
    engine = Engine(COST, 100_000, chunk=1500, whole=True)
    ttft, _ = closed_loop(engine, Load(2, 1000, 11, 1))
    assert ttft == pytest.approx((0.11 + (0.11 + 0.11 + 1e-4)) / 2)


def test_who_does_not_fit_in_the_cache_waits_for_a_whole_request() -> None:
    ttft, _ = closed_loop(Engine(COST, 1011, chunk=4000), Load(2, 1000, 11, 1))
    alone = 0.01 + 0.1
    assert ttft == pytest.approx((alone + alone + 10 * (0.01 + 1e-4) + alone) / 2)


def test_one_row_less_than_clients_makes_one_of_them_wait_for_a_request() -> None:
    alone, decode = 0.01 + 0.1, 10 * (0.01 + 1e-4)
    ttft, _ = closed_loop(Engine(COST, 100_000, max_seqs=1), Load(2, 1000, 11, 50))
    # In a long run each request waits while the other client's is served.
    assert ttft == pytest.approx(2 * alone + decode, rel=0.02)


def test_prompts_that_are_held_back_wait_for_so_many_steps() -> None:
    row = 0.01 + 1e-4
    engine = Engine(COST, 100_000, chunk=4000, gather_steps=3, max_seqs=2)
    first, _ = closed_loop(engine, Load(1, 1000, 11, 1))
    assert first == pytest.approx(0.11)  # nobody runs: there is nothing to wait for
    ttft, _ = closed_loop(engine, Load(3, 1000, 11, 1))
    # Two start at once; the third gets the row of one of them, when nobody runs any more either.
    assert ttft == pytest.approx((0.21 + 0.21 + 0.21 + 10 * (row + 1e-4) + 0.11) / 3)
    staggered = closed_loop(Engine(COST, 1e9, chunk=1000, gather_steps=3), Load(2, 1000, 11, 1))[0]
    assert staggered == pytest.approx((0.11 + 0.11 + 3 * row + 0.11 + row) / 2, rel=0.01)


def test_known_prompts_cost_their_last_block() -> None:
    ttft, _ = closed_loop(Engine(COST, 100_000), Load(1, 1000, 11, 2, cached=True))
    assert ttft == pytest.approx(0.01 + 1e-4 * KEPT_APART)


def test_lengths_scatter_below_the_nominal_ones() -> None:
    ttft, _ = closed_loop(Engine(COST, 100_000), Load(1, 1000, 11, 400, shortest=0.8))
    assert ttft == pytest.approx(0.01 + 0.09, rel=0.01)
