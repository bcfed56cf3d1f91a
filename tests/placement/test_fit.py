"""Fitting a step's cost: non-negative least squares, and a cost that is found again in its own steps."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from baton.core.errors import InvalidRequest
from baton.core.shape import StepShape
from baton.placement.fit import Measurement, fit_cost, residuals
from baton.placement.least_squares import solve_non_negative
from baton.simulator.cost import LinearCost
from hypothesis import given, settings
from hypothesis import strategies as st

TRUE = LinearCost(
    step=2e-3, token=3e-4, floor_tokens=12, pair=2e-8, decode_context=4e-7, decode_row=2e-4, sampled=1e-4,
)  # fmt: skip


def shapes() -> list[StepShape]:
    prompts = [(0, n) for n in (8, 32, 100, 256, 512, 1024)] + [(256, 256), (512, 512), (1024, 100)]
    found = [StepShape(1, n, n * s + n * (n + 1) // 2, s + n, sampled=1) for s, n in prompts]
    found += [StepShape(0, 0, 0, 0, b, b * c, b) for b in (1, 2, 4, 8, 16, 32) for c in (64, 512, 1024)]
    found += [StepShape(1, n, n * (n + 1) // 2, n, b, 512 * b, b + 1) for b, n in ((1, 64), (8, 256), (32, 512))]
    return found


def test_a_cost_is_found_again_in_its_own_steps():
    steps = [Measurement(shape, TRUE.seconds(shape)) for shape in shapes()]
    fitted = fit_cost(steps)
    assert fitted.floor_tokens == 12
    for kind, residual in residuals(fitted, steps).items():
        assert residual.largest < 1e-6, kind
    assert {kind: residual.samples for kind, residual in residuals(fitted, steps).items()} == {
        "prefill": 9, "decode": 18, "mixed": 3,
    }  # fmt: skip


def test_noise_moves_it_little_and_turns_nothing_negative():
    draw = random.Random(1)
    steps = [Measurement(shape, TRUE.seconds(shape) * draw.uniform(0.95, 1.05)) for shape in shapes()]
    fitted = fit_cost(steps)  # a LinearCost refuses negative numbers
    assert all(residual.median < 0.05 for residual in residuals(fitted, steps).values())
    for shape in shapes():
        assert fitted.seconds(shape) == pytest.approx(TRUE.seconds(shape), rel=0.1)


def test_too_little_is_refused():
    with pytest.raises(InvalidRequest, match=r"2 measured steps are too few"):
        fit_cost([Measurement(shape, 1.0) for shape in shapes()[:2]])


@given(st.integers(0, 10_000))
@settings(max_examples=60)
def test_least_squares_are_those_of_the_best_set_of_free_coefficients(seed: int):
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(8, 4)) * 10.0 ** draw.integers(-6, 3, 4), draw.normal(size=8)
    found = solve_non_negative(a, b)
    assert (found >= 0).all()
    best = float(b @ b)
    for free in itertools.product((False, True), repeat=4):
        if any(free):
            x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.sum((a[:, free] @ x - b) ** 2)))
    assert float(np.sum((a @ found - b) ** 2)) <= best * (1 + 1e-8) + 1e-12


def test_equal_columns_and_columns_of_nothing_are_survived():
    a = np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [3.0, 3.0, 0.0]])
    assert a @ solve_non_negative(a, np.array([2.0, 4.0, 6.0])) == pytest.approx([2, 4, 6])
