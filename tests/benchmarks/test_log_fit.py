"""Fitting on logarithms: parameters are found again, and a few absurd rows do not rule them."""

from __future__ import annotations

import numpy as np
import pytest
from log_fit import fit, mean_error, median_error

X = np.linspace(1, 1000, 200)


def model(p):
    return p[0] + p[1] * X


def test_parameters_of_any_size_are_found_again():
    true = np.array([3e-3, 4e-6])
    assert fit(model, model(true), (1e-3, 1e-5), iterations=30, pull=0.0) == pytest.approx(true, rel=1e-2)


def test_absurd_rows_do_not_rule():
    measured = model(np.array([3e-3, 4e-6]))
    measured[::20] *= 1000
    found = fit(model, measured, (1e-3, 1e-5), iterations=30, pull=0.0)
    assert median_error(model(found), measured) < 0.05


def test_what_measurements_leave_open_stays_where_it_was():
    found = fit(lambda p: p[0] * X + 0 * p[1], 2e-3 * X, (1e-3, 7.0), iterations=30)
    assert found == pytest.approx([2e-3, 7.0], rel=0.05)


def test_errors_are_relative():
    assert mean_error(np.array([1.1, 0.9]), np.array([1.0, 1.0])) == pytest.approx(0.1)
