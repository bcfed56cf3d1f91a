"""The linear cost: one formula for prefill, decode and mixed steps, and its closed form over many decode steps."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from baton.core.errors import InvalidRequest
from baton.core.shape import StepShape
from baton.simulator.cost import LinearCost, series
from hypothesis import given
from hypothesis import strategies as st

COST = LinearCost(
    step=1e-3, token=1e-4, floor_tokens=20, pair=1e-7, prefill_context=1e-6, prefill_row=2e-5,
    decode_context=3e-7, decode_row=5e-5, sampled=4e-5,
)  # fmt: skip
_coefficient = st.floats(0, 1e-2, allow_subnormal=False)
costs = st.builds(
    LinearCost, step=st.floats(1e-6, 0.1), token=_coefficient, floor_tokens=st.floats(0, 300), pair=_coefficient,
    prefill_context=_coefficient, prefill_row=_coefficient, decode_context=_coefficient, decode_row=_coefficient,
    sampled=_coefficient, stages=st.integers(1, 8),
)  # fmt: skip
_count = st.integers(0, 5000)
shapes = st.builds(StepShape, _count, _count, _count, _count, _count, _count, _count)


def decode_shape(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=context, sampled=rows)


def test_a_prompt_pays_for_its_tokens_and_their_pairs():
    length = 512
    shape = StepShape(1, length, length * (length + 1) // 2, length, sampled=1)
    expected = 1e-3 + 512e-4 + 1e-7 * 512 * 513 / 2 + 512e-6 + 2e-5 + 4e-5
    assert COST.seconds(shape) == pytest.approx(expected)


def test_a_decode_step_pays_for_its_rows_and_their_context():
    assert COST.seconds(decode_shape(32, 10_000)) == pytest.approx(1e-3 + 32e-4 + 32 * 5e-5 + 10_000 * 3e-7 + 32 * 4e-5)


def test_a_small_step_reads_every_weight_all_the_same():
    free = replace(COST, decode_row=0.0, sampled=0.0)
    assert free.seconds(decode_shape(1, 100)) == free.seconds(decode_shape(20, 100))
    assert free.seconds(decode_shape(21, 100)) == pytest.approx(free.seconds(decode_shape(20, 100)) + 1e-4)


def test_the_tokens_of_a_mixed_step_stream_the_weights_together():
    prefill = StepShape(1, 64, 64 * 65 // 2, 64, sampled=1)
    decode = decode_shape(8, 4000)
    mixed = StepShape(1, 64, 64 * 65 // 2, 64, 8, 4000, 9)
    # Against the two apart it saves one fixed part, and the floor that the decode rows alone would pay.
    saved = COST.seconds(prefill) + COST.seconds(decode) - COST.seconds(mixed)
    assert saved == pytest.approx(1e-3 + 1e-4 * (20 - 8))


@given(costs, st.integers(1, 256), st.integers(1, 100_000), st.integers(0, 300))
def test_many_decode_steps_cost_the_sum_of_them(cost: LinearCost, rows: int, context: int, steps: int):
    one_by_one = math.fsum(cost.seconds(decode_shape(rows, context + i * rows)) for i in range(steps))
    assert cost.decode_seconds(rows, context, steps) == pytest.approx(one_by_one, rel=1e-12)


@given(costs, shapes, shapes)
def test_more_work_never_costs_less(cost: LinearCost, one: StepShape, other: StepShape):
    both = StepShape(*(getattr(one, f.name) + getattr(other, f.name) for f in fields(StepShape)))
    assert cost.seconds(both) >= cost.seconds(one) > 0
    assert cost.seconds(both) <= (cost.seconds(one) + cost.seconds(other)) * (1 + 1e-12)  # never dearer than apart


@pytest.mark.parametrize("field", [f.name for f in fields(LinearCost)])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_a_number_that_is_no_cost_is_refused_by_name(field: str, value: float):
    with pytest.raises(InvalidRequest, match=field) as refused:
        replace(COST, **{field: value})
    assert refused.value.field == field


def test_an_empty_step_costs_something():
    with pytest.raises(InvalidRequest, match=r"step"):
        LinearCost(step=0.0, token=1e-4)
    with pytest.raises(InvalidRequest, match=r"stages"):
        LinearCost(step=1.0, stages=0)
    assert LinearCost(step=0.0, token=1e-4, floor_tokens=1).seconds(StepShape()) == 1e-4


def test_a_series_of_contexts():
    assert series(3, 100, 4) == 100 + 103 + 106 + 109
    assert series(3, 100, 0) == 0
