"""What sharing steps costs: rows that decode beside a chunk of a prompt wait for all of it. Worked out by hand."""

from __future__ import annotations

import pytest
from baton.simulator.cost import LinearCost
from baton.simulator.simulate import simulate
from baton.simulator.workload.planned import PlannedRequest
from baton.tests.simulator.cluster_rig import cluster_setup

COST = LinearCost(0.01, token=0.001)
ANSWER, PROMPT = PlannedRequest(0, 0.0, 1, 21), PlannedRequest(1, 0.05, 400, 1)


def test_decode_rows_wait_for_the_chunks_beside_them() -> None:
    setup = cluster_setup(0, 0, 1, cost=COST, max_step_tokens=100)
    answer, prompt = sorted(simulate(setup, [ANSWER, PROMPT]).outcomes, key=lambda outcome: outcome.index)
    # The first token at 11 ms, then steps of 11 ms until the prompt is there, at the end of the one under way: 55 ms. One row
    # leaves room for 99 tokens: four full steps of 110 ms, a fifth of one row and four tokens, and fifteen without a prompt.
    first, full, last, alone = 0.011, 0.110, 0.015, 0.011
    assert answer.tpot == pytest.approx((4 * alone + 4 * full + last + 11 * alone) / 20)
    assert prompt.ttft == pytest.approx(first + 4 * alone + 4 * full + last - 0.05)


def test_apart_neither_waits_for_the_other() -> None:
    setup = cluster_setup(1, 1, cost=COST, max_step_tokens=100)
    answer, prompt = sorted(simulate(setup, [ANSWER, PROMPT]).outcomes, key=lambda outcome: outcome.index)
    assert answer.tpot == pytest.approx(0.011)
    assert prompt.ttft == pytest.approx(4 * 0.110)
