"""Fitting positive parameters to positive measurements: Levenberg and Marquardt on logarithms, so that errors are relative."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Model = Callable[[Array], Array]
"""Positive parameters to positive predictions."""

STEP = 0.03  # of a logarithm, for derivatives
CLIP = 1.0  # relative errors beyond e**CLIP weigh no more: a few rows that no model explains must not rule the fit


def fit(model: Model, measured: Array, start: Sequence[float], iterations: int = 12, pull: float = 0.02) -> Array:
    """Parameters near `start` with the least sum of absolute log errors (reweighted squares).

    pull  weight of staying near the start: decides what the measurements leave open
    """
    origin = np.log(np.asarray(start, dtype=float))
    at, target, damping = origin.copy(), np.log(measured), 1e-2
    errors = target - np.log(model(np.exp(at)))
    for _ in range(iterations):
        columns = []
        for i in range(len(at)):
            moved = at.copy()
            moved[i] += STEP
            columns.append((np.log(model(np.exp(moved))) - (target - errors)) / STEP)
        jacobian = np.stack(columns, axis=1)
        weights = 1.0 / np.maximum(np.abs(errors), 0.05)  # squares weighted so are absolute values
        weights *= CLIP / np.maximum(np.abs(errors), CLIP)
        normal = jacobian.T @ (jacobian * weights[:, None]) + pull * len(errors) / 10 * np.eye(len(at))
        gradient = jacobian.T @ (weights * errors) - pull * len(errors) / 10 * (at - origin)
        step = np.clip(np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient), -0.7, 0.7)
        candidate = at + step
        new = target - np.log(model(np.exp(candidate)))
        if np.minimum(np.abs(new), CLIP).sum() < np.minimum(np.abs(errors), CLIP).sum():
            gain = np.abs(errors).sum() - np.abs(new).sum()
            at, errors, damping = candidate, new, damping / 3
            if abs(gain) < 1e-4 * np.abs(errors).sum():
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return np.exp(at)


def mean_error(predicted: Array, measured: Array) -> float:
    """Mean of |predicted / measured - 1|."""
    return float(np.mean(np.abs(predicted / measured - 1)))


def median_error(predicted: Array, measured: Array) -> float:
    """Median of the same."""
    return float(np.median(np.abs(predicted / measured - 1)))
