"""What steps cost in service, where workers share their cores with a router, a client and their own event loops.

A profile is taken of an engine alone. Service adds to it, for each pool, some seconds a step, a share of the step, and some
seconds for every token that somebody has to pass on: three numbers of at least 0, fitted to the steps that the workers of a
running cluster remember (`baton.deploy.observe`); and the host's time between two steps.
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
    """seconds = alone + step + share * alone + token * sampled rows, and `overhead` seconds between two steps.

    median_error  what the fit leaves, relative
    """

    step: float
    share: float
    token: float
    overhead: float
    num_steps: int
    median_error: float

    def cost(self, alone: LinearCost) -> LinearCost:
        """The same steps in service."""
        names = ("step", "token", "pair", "prefill_context", "prefill_row", "decode_context", "decode_row", "sampled")
        cost = replace(alone, **{name: (1 + self.share) * getattr(alone, name) for name in names})
        return replace(cost, step=cost.step + self.step, sampled=cost.sampled + self.token)


def calibrate(alone: LinearCost, steps: Sequence[ObservedStep]) -> InService:
    """Least squares of the relative error. Raises Unavailable when too few steps were seen."""
    if len(steps) < LEAST_STEPS:
        raise Unavailable(f"{len(steps)} steps were observed; at least {LEAST_STEPS} are needed: serve for longer")
    typical = statistics.median(each.seconds / alone.seconds(each.shape) for each in steps)
    kept = [each for each in steps if each.seconds < OUTLIER * typical * alone.seconds(each.shape)]
    expected = [alone.seconds(each.shape) for each in kept]
    terms = np.array([[1.0, time, each.shape.sampled] for each, time in zip(kept, expected, strict=True)])
    seconds = np.array([each.seconds for each in kept])
    found = solve_non_negative(terms / seconds[:, None], 1 - np.array(expected) / seconds)
    left = np.abs(terms @ found + expected - seconds) / seconds
    overhead = statistics.median(each.period - each.seconds for each in kept)
    return InService(*map(float, found), overhead, len(kept), float(np.median(left)))
