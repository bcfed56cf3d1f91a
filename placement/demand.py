"""What will be asked of a cluster: a mix of request lengths, offered at any rate with common random numbers.

One seed gives the same requests, with the same lengths and the same unit gaps, at every rate: only time is stretched.
Samples are stratified (every part of the mix has its share in every block of them, and the gaps of a block add up to
the rate), so that a few hundred requests speak for many. Must never read a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ..core.errors import InvalidRequest
from ..simulator.workload.planned import PlannedRequest

MAX_MIX = 1024
"""Length pairs that are kept of a trace: a fair sample of more."""

Lengths = tuple[int, int]
"""Input and output tokens of a request."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A mix of requests, in the order of `stratify`. burstiness is the coefficient of variation of the gaps; 1 is Poisson."""

    mix: tuple[Lengths, ...]
    burstiness: float = 1.0

    @property
    def mean_input(self) -> float:
        return sum(prompt for prompt, _ in self.mix) / len(self.mix)

    @property
    def mean_output(self) -> float:
        return sum(output for _, output in self.mix) / len(self.mix)

    @property
    def max_tokens(self) -> int:
        """Of the longest request, prompt and output."""
        return max(prompt + output for prompt, output in self.mix)

    def requests(self, rate: float, seed: int, num_requests: int, block: int) -> Iterator[PlannedRequest]:
        """`num_requests` requests at `rate` per second; each `block` of them is a stratified sample."""
        at, index = 0.0, 0
        for number in range(-(-num_requests // block)):
            for gap, (prompt, output) in self._block(seed, number, block):
                if index == num_requests:
                    return
                at += gap / rate
                yield PlannedRequest(index, at, prompt, output)
                index += 1

    def _block(self, seed: int, number: int, size: int) -> Iterable[tuple[float, Lengths]]:
        """`size` requests with unit gaps: a stratified sample of the mix in random order."""
        random = Random(f"{seed}/{number}")
        shape = 1.0 / self.burstiness**2
        gaps = [random.expovariate(1.0) if shape == 1.0 else random.gammavariate(shape, 1.0 / shape) for _ in range(size)]
        unit = size / math.fsum(gaps)
        offset = random.random()
        lengths = [self.mix[int((place + offset) / size * len(self.mix))] for place in range(size)]
        random.shuffle(lengths)
        return zip((gap * unit for gap in gaps), lengths, strict=True)


def demand_of(requests: Iterable[Lengths], burstiness: float = 1.0) -> Demand:
    """Of observed or drawn pairs of input and output tokens. Raises InvalidRequest when there are none."""
    pairs = list(requests)
    if not pairs:
        raise InvalidRequest("the workload holds no request; needed: a trace with at least one, or lengths", "trace")
    if not (math.isfinite(burstiness) and burstiness > 0):
        raise InvalidRequest(f"burstiness: {burstiness}; it must be a number above 0 (1 is Poisson)", "burstiness")
    ordered = stratify(pairs)
    if len(ordered) > MAX_MIX:
        ordered = [ordered[int((place + 0.5) / MAX_MIX * len(ordered))] for place in range(MAX_MIX)]
    return Demand(tuple(ordered), burstiness)


def stratify(pairs: Sequence[Lengths]) -> list[Lengths]:
    """Ordered so that every run of neighbours is alike in both lengths: slices by input, each sorted by output, to and fro."""
    by_input = sorted(pairs)
    num_slices = max(1, math.isqrt(len(by_input)) // 2)
    ordered: list[Lengths] = []
    for number in range(num_slices):
        low, high = number * len(by_input) // num_slices, (number + 1) * len(by_input) // num_slices
        ordered += sorted(by_input[low:high], key=lambda pair: pair[1], reverse=number % 2 == 1)
    return ordered
