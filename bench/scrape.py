"""What a router's /metrics say about the handoffs it saw. Pure: text in, figures out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class HandoffFigures:
    """All handoffs of one router so far.

    exposed_mean  seconds from the first token's sampling to the receiver's acknowledgement: what a client may notice
    exposed_p50   the same, the median, read off the histogram's buckets
    push_mean     seconds that the pushes of one handoff took, each up to its acknowledgement; most are over before the
                  first token, and those that overlap count twice
    rate          bytes per second of push time: latency weighs more than bandwidth in it when handoffs are small
    """

    count: int
    transports: tuple[str, ...]
    bytes_mean: float
    exposed_mean: float
    exposed_p50: float
    push_mean: float
    rate: float

    def __str__(self) -> str:
        mean, median = self.exposed_mean * 1000, self.exposed_p50 * 1000
        pushes = f"pushed and acknowledged in {self.push_mean * 1000:.1f} ms ({self.rate / 1e9:.2f} GB/s)"
        return (
            f"{self.count} over {', '.join(self.transports)}: {median:.1f} ms p50, {mean:.1f} ms mean from first token to "
            f"acknowledgement; {self.bytes_mean / 1e6:.2f} MB each, {pushes}"
        )


def read_handoffs(metrics: str) -> HandoffFigures | None:
    """From the text exposition format; None when nothing was handed over."""
    samples = [
        sample
        for family in text_string_to_metric_families(metrics)
        if family.name.startswith("baton_handoff_")
        for sample in family.samples
    ]
    count = _total(samples, "baton_handoff_exposed_seconds_count")
    if not count:
        return None
    num_bytes, seconds = _total(samples, "baton_handoff_bytes_sum"), _total(samples, "baton_handoff_seconds_sum")
    buckets: dict[float, float] = {}
    for sample in samples:
        if sample.name == "baton_handoff_exposed_seconds_bucket":
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
    return HandoffFigures(
        count=int(count),
        transports=tuple(sorted({sample.labels["transport"] for sample in samples if "transport" in sample.labels})),
        bytes_mean=num_bytes / count,
        exposed_mean=_total(samples, "baton_handoff_exposed_seconds_sum") / count,
        exposed_p50=bucket_quantile(sorted(buckets.items()), 0.5),
        push_mean=seconds / count,
        rate=num_bytes / seconds if seconds else 0.0,
    )


def bucket_quantile(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Of a cumulative histogram of (upper bound, count) in ascending order, interpolated linearly within a bucket.

    In the last, unbounded bucket it is the highest finite bound, as in Prometheus.
    """
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted and count > below:
            return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


def _total(samples: Iterable[Sample], name: str) -> float:
    return sum(sample.value for sample in samples if sample.name == name)
