"""Goodput: the largest rate at which the attainment still reaches its target, found by bisection, seed by seed.

Every seed is an experiment of its own with common random numbers: the same requests at every rate. So the attainment falls
with the rate but for a request or two, and seeds tell how far one experiment can be trusted. How a rate is tried is the
caller's: closed forms in tests, the simulator in a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_FAR, _NEAR = 1.15, 1.05
"""The first step from a guess, and from what another seed found; later steps grow."""
_MAX_STEP = 4.0
_MAX_STEPS_DOWN = 12  # from the first guess: below a millionth of it there is no goodput worth naming


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate tried with one seed. attainment is exact when `complete`; else the trial ended when the verdict was certain."""

    rate: float
    seed: int
    attainment: float
    met: bool
    complete: bool = True


SimulateOnce = Callable[[float, int], Trial]
"""Rate (requests/s) and seed in, what came of it out."""


@dataclass(frozen=True, slots=True)
class GoodputOptions:
    """seeds are tried in order; precision is the ratio at which a bisection ends."""

    seeds: tuple[int, ...] = (0, 1, 2)
    precision: float = 0.03


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests/s: the mean over seeds, and the least and largest of them. trials are all that were run."""

    mean: float
    low: float
    high: float
    trials: tuple[Trial, ...] = ()

    @property
    def spread(self) -> float:
        """Half the interval, relative."""
        return (self.high - self.low) / 2 / self.mean if self.mean else 0.0

    def times(self, factor: float) -> Goodput:
        """So much of it, after the same trials."""
        return replace(self, mean=self.mean * factor, low=self.low * factor, high=self.high * factor)


def find_goodput(
    simulate_once: SimulateOnce,
    guess: float,
    most: float,
    options: GoodputOptions,
    *,
    near: bool = False,
    reached: Trial | None = None,
) -> Goodput:
    """Search every seed, the first from `guess`, none above `most` (a bound that may be inf). 0 when no rate will do.

    near     the guess is another seed's goodput
    reached  a trial of the first seed that met the target: its rate is where that seed starts
    """
    if most <= 0:
        return Goodput(0.0, 0.0, 0.0)
    trials = [reached] if reached is not None else []
    found: list[float] = []
    start = min(reached.rate if reached is not None else guess, most)
    for seed in options.seeds:
        known = reached is not None and not found
        found.append(_search(simulate_once, seed, start, most, _NEAR if near else _FAR, options.precision, trials, known))
        start, near = (found[-1], True) if found[-1] > 0 else (start, near)
    return _goodput(found, trials)


def together(goodputs: Sequence[Goodput]) -> Goodput:
    """Of several seeds (one or more), each of which was searched alone."""
    trials = [trial for each in goodputs for trial in each.trials]
    return _goodput([each.mean for each in goodputs], trials)


def _goodput(found: list[float], trials: list[Trial]) -> Goodput:
    return Goodput(sum(found) / len(found), min(found), max(found), tuple(trials))


def _search(
    simulate_once: SimulateOnce,
    seed: int,
    start: float,
    most: float,
    step: float,
    precision: float,
    trials: list[Trial],
    known: bool,
) -> float:
    """Bracket by steps from `start` (`known` to be reached), then bisect geometrically."""

    def reached(rate: float) -> bool:
        trials.append(simulate_once(rate, seed))
        return trials[-1].met

    enough = 1 + precision
    low, high = start, start
    if known or reached(start):
        while most / low > enough:
            high = min(low * step, most)
            if not reached(high):
                break
            low, step = high, min(step * step, _MAX_STEP)
        else:
            return math.sqrt(low * most)
    else:
        for _ in range(_MAX_STEPS_DOWN):
            low = high / step
            if reached(low):
                break
            high, step = low, min(step * step, _MAX_STEP)
        else:
            return 0.0
    while high / low > enough:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if reached(middle) else (low, middle)
    return math.sqrt(low * high)
