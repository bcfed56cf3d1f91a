"""From raw times to figures. Pure.

Attainment is the share of **all offered** requests that met both objectives: what failed, was shed or never ended
is a miss. Percentiles are over the requests that finished and have the figure; the counts stand beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.slo import Slo
from .records import LoadResult, RequestRecord


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds, over `count` values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run. Rates are per second of `duration`.

    goodput             requests that met both objectives, per second
    goodput_per_worker  the same by worker; None when their number is not known
    num_late_first, num_slow_tokens   finished requests that missed TTFT, TPOT (one may miss both)
    client_lag          offered to sent: the client's own lateness
    loop_lag            lateness of the client's timers
    errors              kind of failure and count, the most frequent first
    """

    num_offered: int
    num_finished: int
    num_failed: int
    num_met: int
    num_late_first: int
    num_slow_tokens: int
    duration: float
    offered_rate: float
    request_rate: float
    attainment: float
    goodput: float
    goodput_per_worker: float | None
    input_tokens: int
    output_tokens: int
    output_token_rate: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    latency: Distribution | None
    client_lag: Distribution | None
    loop_lag: Distribution | None
    errors: tuple[tuple[str, int], ...]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, interpolated linearly between the two nearest (`share` 0.5 is the median)."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Iterable[float | None]) -> Distribution | None:
    """Of the values that are there; None when there is none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    mean = sum(ordered) / len(ordered)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Distribution(len(ordered), mean, p50, p90, p99, ordered[-1])


def met(record: RequestRecord, slo: Slo) -> bool:
    """Whether the request ended well and met both objectives."""
    return record.ok and slo.met_by(record.ttft, record.tpot)


def summarise(result: LoadResult, slo: Slo, num_workers: int | None = None) -> Summary:
    """The figures of a run against `slo`."""
    records = result.records
    finished = [record for record in records if record.ok]
    num_met = sum(met(record, slo) for record in finished)
    output_tokens = sum(record.num_tokens for record in records)
    seconds = max(result.duration, 1e-9)
    last_offered = max((record.offered for record in records), default=0.0)
    return Summary(
        num_offered=len(records),
        num_finished=len(finished),
        num_failed=len(records) - len(finished),
        num_met=num_met,
        num_late_first=sum(record.ttft is not None and record.ttft > slo.ttft for record in finished),
        num_slow_tokens=sum(record.tpot is not None and record.tpot > slo.tpot for record in finished),
        duration=result.duration,
        offered_rate=len(records) / last_offered if last_offered > 0 else 0.0,
        request_rate=len(finished) / seconds,
        attainment=num_met / len(records) if records else 0.0,
        goodput=num_met / seconds,
        goodput_per_worker=num_met / seconds / num_workers if num_workers else None,
        input_tokens=sum(record.prompt_tokens or record.input_tokens for record in finished),
        output_tokens=output_tokens,
        output_token_rate=output_tokens / seconds,
        ttft=distribution(record.ttft for record in finished),
        tpot=distribution(record.tpot for record in finished),
        itl=distribution(gap for record in finished for gap in record.gaps),
        latency=distribution(record.latency for record in finished),
        client_lag=distribution(record.lag for record in records),
        loop_lag=distribution(result.loop_lags),
        errors=tuple(Counter(record.error or "no token" for record in records if not record.ok).most_common()),
    )


def client_warning(summary: Summary, slo: Slo) -> str | None:
    """Why the figures may say more about this client than about the server; None when they do not.

    Late sending is inside TTFT; late timers mean late reading, which blurs every time.
    """
    lag, loop = summary.client_lag, summary.loop_lag
    if lag is not None and lag.p99 > 0.05 * slo.ttft:
        return f"the client sent late: p99 {lag.p99 * 1000:.0f} ms, which TTFT includes; use a faster client or a lower rate"
    if loop is not None and loop.p99 > slo.tpot:
        return (
            f"the client read late: p99 {loop.p99 * 1000:.0f} ms, above the TPOT objective; use a faster client or a lower rate"
        )
    return None
