"""Scales: nothing lands outside, and ticks are round."""

from __future__ import annotations

import pytest
from baton.observability.svg import Scale, fitting_scale
from hypothesis import given
from hypothesis import strategies as st

POSITIVE = st.floats(1e-4, 1e4)


@given(st.lists(POSITIVE, min_size=1), st.lists(POSITIVE, max_size=1))
def test_a_fitting_scale_holds_its_values_in_order(values: list[float], marks: list[float]) -> None:
    scale = fitting_scale(values, marks)
    places = [scale.place(value) for value in sorted([*values, *marks])]
    assert all(0 <= place <= 1 for place in places)
    assert places == sorted(places)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 9
    assert all(scale.low * 0.998 <= tick <= scale.high * 1.002 for tick in ticks)


@pytest.mark.parametrize("scale", [Scale(0, 40), Scale(0.5, 5000, log=True)])
def test_place_and_value_are_inverse(scale: Scale) -> None:
    for place in (0.0, 0.25, 0.5, 1.0):
        assert scale.place(scale.value(place)) == pytest.approx(place)
    assert scale.place(1e9) == 1.0


def test_ticks_are_round() -> None:
    assert Scale(0, 33).ticks() == [0, 10, 20, 30]
    assert Scale(0, 0.9).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert Scale(4, 600, log=True).ticks() == [5, 10, 20, 50, 100, 200, 500]


def test_values_far_apart_get_a_logarithmic_scale() -> None:
    assert fitting_scale([1, 500]).log
    assert fitting_scale([10], [500]).log
    assert not fitting_scale([100, 500]).log
    assert not fitting_scale([]).log
