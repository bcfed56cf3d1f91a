"""The spread of any number of values in flat memory: every quantile within half a percent of the true one.

Counts in buckets whose bounds grow by a constant factor (DDSketch: Masson, Rim and Lee, VLDB 2019). Two sketches add up to
the sketch of all their values. Must never hold a value itself.
"""

from __future__ import annotations

import math

ACCURACY = 0.005
"""Largest relative error of a quantile."""

_SMALLEST = 1e-9  # seconds, say: what is not above it counts as 0
_ZERO = -(1 << 20)  # the bucket of 0
_FACTOR = (1 + ACCURACY) / (1 - ACCURACY)
_SCALE = 1 / math.log(_FACTOR)


class Sketch:
    """A growing set of values of 0 or above, forgotten but for their spread."""

    __slots__ = ("_buckets", "count", "max", "total")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.max = 0.0

    def add(self, value: float) -> None:
        """Count one value; below 0 (by rounding) it is 0."""
        self.count += 1
        place = _ZERO
        if value > _SMALLEST:
            self.total += value
            place = math.ceil(math.log(value) * _SCALE)
            if value > self.max:
                self.max = value
        self._buckets[place] = self._buckets.get(place, 0) + 1

    def merge(self, other: Sketch) -> None:
        """Add all values of `other`."""
        for place, count in other._buckets.items():
            self._buckets[place] = self._buckets.get(place, 0) + count
        self.count += other.count
        self.total += other.total
        self.max = max(self.max, other.max)

    @property
    def mean(self) -> float:
        """Exact; 0 without values."""
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """The value below which `share` of all lie (0.5 is the median), within `ACCURACY`; 0 without values."""
        rank = share * (self.count - 1)
        seen = 0
        for place, count in sorted(self._buckets.items()):
            seen += count
            if seen > rank:
                return min(_middle(place), self.max)
        return self.max

    def share_within(self, bound: float) -> float:
        """The share of values up to `bound`, off by those within `ACCURACY` of it at most; 1 without values."""
        if not self.count:
            return 1.0
        return sum(count for place, count in self._buckets.items() if _middle(place) <= bound) / self.count


def _middle(place: int) -> float:
    """The value with the same relative distance to both bounds of a bucket."""
    return 0.0 if place == _ZERO else 2 * math.exp(place / _SCALE) / (1 + _FACTOR)
