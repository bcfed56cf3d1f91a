"""Whether to change what runs: only for a gain that is certain and worth it. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import InternalError

# Two-sided 95% quantiles of Student's t, for 2, 3, ... seeds.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much an alternative surpasses what runs, relative: `mean` +- `uncertainty`.

    Infinite when what runs meets the objectives at no rate and the alternative does with every seed.
    """

    mean: float
    uncertainty: float

    def __str__(self) -> str:
        return "everything" if math.isinf(self.mean) else f"{self.mean:+.1%} +- {self.uncertainty:.1%}"


def gain_of(now: Sequence[float], then: Sequence[float], error: float) -> Gain:
    """From the goodputs of both, seed by seed with common random numbers.

    `error` is the relative error of the step times behind them. It is taken to hit the two independently of each other, which
    is cautious: most of it moves both the same way. The seeds' part is the 95% interval of their mean by Student's t.
    """
    if len(now) != len(then) or len(now) < 2:
        raise InternalError(f"{len(now)} and {len(then)} goodputs cannot be compared pair by pair; needed: at least two of each")
    if min(now) <= 0:
        return Gain(math.inf, 0.0) if max(now) <= 0 < min(then) else Gain(0.0, math.inf)
    if min(then) <= 0:
        return Gain(-1.0, 0.0)
    logs = [math.log(after / before) for before, after in zip(now, then, strict=True)]
    mean = statistics.fmean(logs)
    quantile = _T95[min(len(logs), len(_T95) + 1) - 2]
    seeds = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return Gain(math.exp(mean) - 1, math.exp(math.hypot(seeds, error)) - 1)


def worth_it(gain: Gain, minimal: float) -> bool:
    """Never for a gain within the uncertainty, nor for less than `minimal`: a change costs a restart, and must not be undone
    by the next look at the same traffic."""
    return gain.mean > gain.uncertainty and gain.mean >= minimal
