"""What steps cost in service, where workers share their cores with a router, a client and their own event loops.

A profile is taken of an engine alone. In service a step takes added + factor * its time alone: two numbers for each pool, fitted
to the steps that the workers of a running cluster remember (`baton.deploy.observe`), and one for the host between steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from baton.core.errors import Unavailable
from baton.core.observed import ObservedStep
from baton.placement.least_squares import solve_non_negative
from baton.simulator.cost import LinearCost

LEAST_STEPS = 16
OUTLIER = 2.0  # times the median ratio to the time alone: the machine did something else during such a step


@dataclass(frozen=True, slots=True)
class InService:
    """added and overhead in seconds; `overhead` lies between two steps, `median_error` is what the fit leaves."""

    added: float
    factor: float
    overhead: float
    num_steps: int
    median_error: float

    def cost(self, alone: LinearCost) -> LinearCost:
        """The same steps in service."""
        scaled = {
            name: self.factor * getattr(alone, name)
            for name in ("token", "pair", "prefill_context", "prefill_row", "decode_context", "decode_row", "sampled")
        }
        return replace(alone, step=self.added + self.factor * alone.step, **scaled)


def calibrate(alone: LinearCost, steps: Sequence[ObservedStep]) -> InService:
    """Least squares of the relative error. Raises Unavailable when too few steps were seen."""
    if len(steps) < LEAST_STEPS:
        raise Unavailable(f"{len(steps)} steps were observed; at least {LEAST_STEPS} are needed: serve for longer")
    typical = statistics.median(step.seconds / alone.seconds(step.shape) for step in steps)
    kept = [step for step in steps if step.seconds < OUTLIER * typical * alone.seconds(step.shape)]
    rows = np.array([[1.0 / step.seconds, alone.seconds(step.shape) / step.seconds] for step in kept])
    added, factor = solve_non_negative(rows, np.ones(len(kept)))
    fitted = InService(float(added), float(factor), 0.0, len(kept), 0.0)
    cost = fitted.cost(alone)
    return replace(
        fitted,
        overhead=statistics.median(step.period - step.seconds for step in kept),
        median_error=statistics.median(abs(cost.seconds(step.shape) / step.seconds - 1) for step in kept),
    )
