"""Least squares with coefficients of at least 0 (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def solve_non_negative(a: Array, b: Array) -> Array:
    """x >= 0 [n] that minimises |a x - b| for a [m, n] and b [m].

    Columns are brought to one length first, so that coefficients of very different sizes are judged alike.
    """
    lengths = np.linalg.norm(a, axis=0)
    lengths[lengths == 0.0] = 1.0
    scaled = a / lengths
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], dtype=bool)  # coefficients that are not held at 0
    tolerance = 1e-12 * max(1.0, float(np.abs(scaled.T @ b).max(initial=0.0)))
    for _ in range(10 * a.shape[1] + 10):
        gradient = scaled.T @ (b - scaled @ x)
        gradient[free] = -np.inf
        best = int(np.argmax(gradient))
        if free.all() or gradient[best] <= tolerance:
            break
        free[best] = True
        x = _settle(scaled, b, x, free)
    return np.asarray(x / lengths)


def _settle(a: Array, b: Array, x: Array, free: NDArray[np.bool_]) -> Array:
    """The best x over the free coefficients; those that would turn negative are held at 0 again, one after the other."""
    while True:
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
        negative = free & (wanted <= 0.0)
        if not negative.any():
            return wanted
        # As far towards `wanted` as all stay at 0 or above.
        share = float(np.min(x[negative] / np.maximum(x[negative] - wanted[negative], 1e-300)))
        x = x + share * (wanted - x)
        free &= x > 1e-15
        x[~free] = 0.0
