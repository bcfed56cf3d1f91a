"""When requests arrive: endless or ending streams of ascending times, in seconds after the start.

A process draws from the generator that it is given. Two rates of one process with equally seeded generators give the
same stream, stretched: common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Protocol

from ...core.errors import InvalidRequest


class Arrivals(Protocol):
    """A stream of arrival times. `rate` is their mean number per second; None where the stream ends by itself."""

    @property
    def rate(self) -> float | None: ...

    def times(self, random: Random) -> Iterator[float]: ...


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Independent gaps, exponential with mean 1 / `rate`; `math.inf`: all at once."""

    rate: float

    def __post_init__(self) -> None:
        _check_rate(self.rate)

    def times(self, random: Random) -> Iterator[float]:
        at = 0.0
        while True:
            at += 0.0 if math.isinf(self.rate) else random.expovariate(self.rate)
            yield at


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Independent gaps from a Gamma distribution with mean 1 / `rate` and coefficient of variation `cv`: 1 is Poisson, more is
    burstier, 0 is a metronome."""

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        if not 0 <= self.cv < math.inf:
            raise InvalidRequest(f"burstiness: {self.cv}; it must be a number, 0 or above", "burstiness")

    def times(self, random: Random) -> Iterator[float]:
        at = 0.0
        shape = 1 / self.cv**2 if self.cv else math.inf
        while True:
            if math.isfinite(self.rate):
                # The factor outside: the draw itself must not depend on the rate.
                at += (random.gammavariate(shape, 1 / shape) if self.cv else 1.0) / self.rate
            yield at


@dataclass(frozen=True, slots=True)
class ReplayArrivals:
    """Recorded times, each multiplied by `time_scale`: 0.5 replays twice as fast. Draws nothing."""

    recorded: Sequence[float]
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.time_scale < math.inf:
            raise InvalidRequest(f"time-scale: {self.time_scale}; it must be a number above 0", "time-scale")
        if any(later < earlier for earlier, later in pairwise(self.recorded)):
            raise InvalidRequest("recorded arrivals go back in time; sort them", "trace")

    @property
    def rate(self) -> None:
        return None

    def times(self, random: Random) -> Iterator[float]:
        return (at * self.time_scale for at in self.recorded)


@dataclass(frozen=True, slots=True)
class PiecewiseArrivals:
    """Poisson arrivals whose rate changes: `parts` are (seconds, requests per second), one after the other; ends with the last.

    Scaling every rate, or moving where a part ends, keeps the underlying draws.
    """

    parts: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not any(seconds > 0 and rate > 0 for seconds, rate in self.parts):
            raise InvalidRequest("rates: no part has both a duration and a rate above 0: nothing would ever arrive", "rates")
        if not all(0 <= value < math.inf for part in self.parts for value in part):
            raise InvalidRequest(f"rates: {self.parts}; durations and rates must be finite numbers, 0 or above", "rates")

    @property
    def rate(self) -> None:
        return None

    def times(self, random: Random) -> Iterator[float]:
        # Arrivals of rate 1 in "expected requests", mapped back to time: Lewis and Shedler's inversion.
        wanted = random.expovariate(1.0)
        begin, before = 0.0, 0.0
        for seconds, rate in self.parts:
            while wanted <= before + seconds * rate:
                yield begin + (wanted - before) / rate
                wanted += random.expovariate(1.0)
            begin, before = begin + seconds, before + seconds * rate


def _check_rate(rate: float) -> None:
    if not rate > 0:
        raise InvalidRequest(f"rate: {rate} requests/s; it must be above 0, or inf", "rate")
