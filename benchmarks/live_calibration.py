"""What steps cost in service, where workers share their cores with a router, a client and their own event loops.

A profile is taken of an engine alone. Service adds to it, for each pool, some seconds a step, a share of the step, and some
seconds for every token that somebody has to pass on: three numbers of at least 0, fitted to the steps that the workers of a
running cluster remember (`baton.deploy.observe`), then scaled so that all of them together take as long as they took, stalls
included; and the host's time between two steps. Then there is the way from the client to the router and back.
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

    def scaled(self, factor: float) -> InService:
        """All seconds of a step times `factor`."""
        return replace(self, step=factor * self.step, share=factor * (1 + self.share) - 1, token=factor * self.token)

    def cost(self, alone: LinearCost) -> LinearCost:
        """The same steps in service."""
        names = ("step", "token", "pair", "prefill_context", "prefill_row", "decode_context", "decode_row", "sampled")
        cost = replace(alone, **{name: (1 + self.share) * getattr(alone, name) for name in names})
        return replace(cost, step=cost.step + self.step, sampled=cost.sampled + self.token)


@dataclass(frozen=True, slots=True)
class Calibration:
    """One system's: its pools by role, and the seconds that a first token takes beyond what the router sees."""

    pools: dict[str, InService]
    client: float


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
    overhead = statistics.fmean(each.period - each.seconds for each in kept)
    fitted = InService(*map(float, found), overhead, len(kept), float(np.median(left)))
    cost = fitted.cost(alone)
    return fitted.scaled(sum(each.seconds for each in steps) / sum(cost.seconds(each.shape) for each in steps))
