"""What is offered to a server and when: planned requests, made from a seed alone.

A workload is a sequence of `PlannedRequest`, in order of their times. It says how long a prompt is, never what
stands in it (`prompts` does), so that a trace of a million tokens is a small list. Must never read a clock: times
are seconds after the start of a run. Arrivals and lengths draw from separate generators, so two rates with one seed
offer the same requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from ..core.errors import InvalidRequest

LENGTH_FORMS = "a number, uniform:LOW,HIGH or exponential:MEAN"


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request to offer.

    index         its place in the workload: prompts are keyed by it
    at            seconds after the start of the run
    block_ids     ids of the leading 512-token blocks of the prompt; equal ids mean equal tokens
    prompt        text to send instead of a made-up prompt
    """

    index: int
    at: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens, drawn per request: fixed (`low == high`), uniform over both ends, or exponential with mean `high`."""

    kind: str
    low: int
    high: int

    def draw(self, random: Random) -> int:
        """At least 1."""
        if self.kind == "fixed":
            return self.high
        if self.kind == "uniform":
            return random.randint(self.low, self.high)
        return max(self.low, round(random.expovariate(1 / self.high)))

    def __str__(self) -> str:
        return {"fixed": f"{self.high}", "uniform": f"uniform:{self.low},{self.high}"}.get(self.kind, f"exponential:{self.high}")


def parse_length(text: str, name: str) -> Length:
    """`512`, `uniform:64,512` or `exponential:256`; `name` is the option, for the error."""
    kind, _, values = text.partition(":") if ":" in text else ("fixed", "", text)
    try:
        numbers = [int(value) for value in values.split(",")]
    except ValueError:
        numbers = []
    expected = {"fixed": 1, "uniform": 2, "exponential": 1}.get(kind)
    if expected != len(numbers) or min(numbers) < 1 or numbers[0] > numbers[-1]:
        raise InvalidRequest(f"{name}: {text!r} is no length; allowed is {LENGTH_FORMS}, whole numbers of tokens >= 1", name)
    return Length(kind, 1 if kind == "exponential" else numbers[0], numbers[-1])


def poisson_workload(
    rate: float,
    input_length: Length,
    output_length: Length,
    *,
    num_requests: int | None = None,
    duration: float | None = None,
    seed: int = 0,
) -> tuple[PlannedRequest, ...]:
    """An open loop at `rate` requests per second (`math.inf`: all at once), ended by a number, a duration, or both.

    Raises InvalidRequest when it would be empty or endless.
    """
    if not rate > 0:
        raise InvalidRequest(f"rate: {rate} requests/s; it must be above 0, or inf", "rate")
    if num_requests is None and (duration is None or math.isinf(rate)):
        raise InvalidRequest("the workload has no end: give a number of requests (or a duration and a finite rate)", "requests")
    if (num_requests is not None and num_requests < 1) or (duration is not None and not duration > 0):
        raise InvalidRequest(f"{num_requests} requests in {duration} s: both must be above 0", "requests")
    inputs, outputs = Random(f"{seed}/input"), Random(f"{seed}/output")
    planned = tuple(
        PlannedRequest(index, at, input_length.draw(inputs), output_length.draw(outputs))
        for index, at in enumerate(_arrivals(rate, num_requests, duration, Random(f"{seed}/arrivals")))
    )
    if not planned:
        raise InvalidRequest(
            f"no request arrives within {duration} s at {rate} requests/s with seed {seed}; allow more time", "duration"
        )
    return planned


def _arrivals(rate: float, num_requests: int | None, duration: float | None, random: Random) -> Iterator[float]:
    at, made = 0.0, 0
    while num_requests is None or made < num_requests:
        at += 0.0 if math.isinf(rate) else random.expovariate(rate)
        if duration is not None and at > duration:
            return
        yield at
        made += 1
