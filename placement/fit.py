"""From measured steps to a `LinearCost`: non-negative least squares on relative errors, every kind of step counting alike."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..core.errors import InvalidRequest
from ..core.shape import StepShape
from ..simulator.cost import LinearCost
from .least_squares import Array, solve_non_negative
from .profile import Residual

# Tokens up to which products may take the time of reading the weights: candidates, the best is kept.
FLOORS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
COEFFICIENTS = (
    "step", "token", "pair", "prefill_context", "prefill_row", "decode_context", "decode_row", "sampled",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measurement:
    """A step that took `seconds`. `kind` is "prefill", "decode" or "mixed"; errors count `weight` times as much as others'."""

    shape: StepShape
    seconds: float
    weight: float = 1.0

    @property
    def kind(self) -> str:
        if not self.shape.decode_rows:
            return "prefill"
        return "mixed" if self.shape.prefill_rows else "decode"


def fit_cost(measurements: Sequence[Measurement], stages: int = 1) -> LinearCost:
    """The cost nearest to what was measured. Raises InvalidRequest when there is too little to fit."""
    if len(measurements) < 3:
        raise InvalidRequest(f"{len(measurements)} measured steps are too few to fit a step's cost; measure at least 3")
    kinds = Counter(m.kind for m in measurements)
    weights = np.array([m.weight * (len(measurements) / kinds[m.kind]) ** 0.5 for m in measurements])
    seconds = np.array([m.seconds for m in measurements])
    best: tuple[float, LinearCost] | None = None
    for floor in FLOORS:
        features = np.array([_features(m.shape, floor) for m in measurements])
        relative = features * (weights / seconds)[:, None]
        solution = solve_non_negative(relative, weights)
        # An empty step must cost something, however little.
        solution[0] = max(solution[0], 1e-6 * float(seconds.min()))
        error = float(np.sum((relative @ solution - weights) ** 2))
        if best is None or error < best[0] * (1 - 1e-9):
            best = error, _cost(solution, floor, stages)
    assert best is not None  # there are floors
    return best[1]


def residuals(cost: LinearCost, measurements: Sequence[Measurement]) -> dict[str, Residual]:
    """Relative errors by kind of step, for the kinds that were measured."""
    found: dict[str, list[float]] = {}
    for m in measurements:
        found.setdefault(m.kind, []).append(abs(cost.seconds(m.shape) / m.seconds - 1))
    return {kind: Residual(statistics.median(errors), max(errors), len(errors)) for kind, errors in found.items()}


def _features(shape: StepShape, floor: int) -> tuple[float, ...]:
    """What each of `COEFFICIENTS` is multiplied with."""
    return (
        1.0,
        max(shape.num_tokens, floor),
        shape.prefill_pairs,
        shape.prefill_context,
        shape.prefill_rows,
        shape.decode_context,
        shape.decode_rows,
        shape.sampled,
    )


def _cost(solution: Array, floor: int, stages: int) -> LinearCost:
    named = {name: float(value) for name, value in zip(COEFFICIENTS, solution, strict=True)}
    return LinearCost(**named, floor_tokens=float(floor), stages=stages)
