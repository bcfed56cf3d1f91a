"""Made-up workloads: arrivals and lengths put together, from a seed alone.

Arrivals, prompts, answers and tenants draw from separate generators, so two rates with one seed offer the same requests:
what is compared then is what is served, not the luck of the draw (common random numbers).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice, takewhile
from random import Random

from ...core.errors import InvalidRequest
from .arrivals import Arrivals, PoissonArrivals
from .lengths import IndependentLengths, LengthDistribution, RequestLengths
from .planned import PlannedRequest


def synthetic_workload(
    arrivals: Arrivals,
    lengths: RequestLengths,
    *,
    num_requests: int | None = None,
    duration: float | None = None,
    seed: int = 0,
) -> Iterator[PlannedRequest]:
    """One request after the other, ended by a number, a duration, both, or the arrivals themselves; holds nothing in memory.

    Raises InvalidRequest, before the first request, when it would be endless; it may turn out empty.
    """
    times = arrival_times(arrivals, num_requests, duration, seed)
    inputs, outputs = Random(f"{seed}/input"), Random(f"{seed}/output")
    return (PlannedRequest(index, at, *lengths.draw(inputs, outputs)) for index, at in enumerate(times))


def arrival_times(arrivals: Arrivals, num_requests: int | None, duration: float | None, seed: int) -> Iterator[float]:
    """The times of a workload. Raises InvalidRequest when there would be no end to them."""
    if (num_requests is not None and num_requests < 1) or (duration is not None and not duration > 0):
        raise InvalidRequest(f"{num_requests} requests in {duration} s: both must be above 0", "requests")
    if num_requests is None and arrivals.rate is not None and (duration is None or math.isinf(arrivals.rate)):
        raise InvalidRequest("the workload has no end: give a number of requests (or a duration and a finite rate)", "requests")
    times = arrivals.times(Random(f"{seed}/arrivals"))
    until = math.inf if duration is None else duration
    return islice(takewhile(lambda at: at <= until, times), num_requests)


def poisson_workload(
    rate: float,
    input_length: LengthDistribution,
    output_length: LengthDistribution,
    *,
    num_requests: int | None = None,
    duration: float | None = None,
    seed: int = 0,
) -> tuple[PlannedRequest, ...]:
    """An open loop at `rate` requests per second (`math.inf`: all at once), ended by a number, a duration, or both.

    Raises InvalidRequest when it would be empty or endless.
    """
    arrivals, lengths = PoissonArrivals(rate), IndependentLengths(input_length, output_length)
    planned = tuple(synthetic_workload(arrivals, lengths, num_requests=num_requests, duration=duration, seed=seed))
    if not planned:
        raise InvalidRequest(
            f"no request arrives within {duration} s at {rate} requests/s with seed {seed}; allow more time", "duration"
        )
    return planned
