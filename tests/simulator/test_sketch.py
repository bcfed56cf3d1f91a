"""Quantiles from counts: close to the true ones whatever the values, and flat in memory."""

from __future__ import annotations

import math
from random import Random

import pytest
from baton.simulator.sketch import ACCURACY, Sketch
from hypothesis import given
from hypothesis import strategies as st

values = st.lists(st.one_of(st.just(0.0), st.floats(1e-8, 1e7)), min_size=1, max_size=300)


def sketch_of(numbers: list[float]) -> Sketch:
    sketch = Sketch()
    for number in numbers:
        sketch.add(number)
    return sketch


@given(values, st.floats(0.0, 1.0))
def test_every_quantile_is_within_the_accuracy_of_a_true_one(numbers: list[float], share: float) -> None:
    true = sorted(numbers)[math.floor(share * (len(numbers) - 1))]
    found = sketch_of(numbers).quantile(share)
    assert abs(found - true) <= true * ACCURACY * (1 + 1e-6)


@given(values)
def test_mean_largest_and_count_are_exact(numbers: list[float]) -> None:
    sketch = sketch_of(numbers)
    assert sketch.mean == pytest.approx(math.fsum(numbers) / len(numbers))
    assert sketch.max == max(numbers)
    assert sketch.count == len(numbers)
    assert sketch.quantile(1.0) <= sketch.max


@given(values, values)
def test_two_sketches_add_up(one: list[float], other: list[float]) -> None:
    merged, together = sketch_of(one), sketch_of(one + other)
    merged.merge(sketch_of(other))
    assert [merged.quantile(share / 10) for share in range(11)] == [together.quantile(share / 10) for share in range(11)]
    assert (merged.count, merged.max, merged.mean) == (together.count, together.max, pytest.approx(together.mean))


def test_a_skewed_spread_of_many_values() -> None:
    random = Random(0)
    numbers = sorted(random.lognormvariate(-2, 2) for _ in range(100_000))
    sketch = sketch_of(numbers)
    for share in (0.01, 0.5, 0.9, 0.99, 0.999):
        assert sketch.quantile(share) == pytest.approx(numbers[int(share * 99_999)], rel=ACCURACY * 1.001)
    assert len(sketch._buckets) < 2500, "buckets grow with the range of the values, not with their number"
    bound = numbers[70_000]
    assert sketch.share_within(bound) == pytest.approx(0.7, abs=0.01)


def test_nothing_has_no_spread() -> None:
    empty = Sketch()
    assert (empty.quantile(0.5), empty.mean, empty.max, empty.share_within(1.0)) == (0.0, 0.0, 0.0, 1.0)


def test_a_value_just_below_zero_by_rounding_is_zero() -> None:
    sketch = sketch_of([-1e-17, 0.0, 1.0])
    assert sketch.quantile(0.0) == 0.0
    assert sketch.share_within(0.0) == pytest.approx(2 / 3)
