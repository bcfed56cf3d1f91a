"""Figures from raw times, against hand-made runs."""

from __future__ import annotations

import statistics

import pytest
from baton.bench.metrics import client_warning, distribution, met, percentile, summarise
from baton.bench.records import LoadResult, RequestRecord
from baton.core.slo import Slo
from hypothesis import given
from hypothesis import strategies as st

SLO = Slo(ttft=0.5, tpot=0.05, attainment=0.9)


def record(index: int, ttft: float = 0.1, gaps: tuple[float, ...] = (0.02, 0.02), **changes: object) -> RequestRecord:
    """Offered at its index; the first token after `ttft`, the others after `gaps`."""
    times = [index + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    fields: dict[str, object] = {
        "index": index,
        "input_tokens": 10,
        "output_tokens": len(times),
        "offered": float(index),
        "sent": float(index),
        "chunk_times": tuple(times),
        "num_tokens": len(times),
        "end": times[-1],
    }
    return RequestRecord(**(fields | changes))  # type: ignore[arg-type]


def failed(index: int, error: str = "http 429") -> RequestRecord:
    return RequestRecord(index, 10, 3, float(index), float(index), end=index + 0.01, error=error)


def result(*records: RequestRecord, duration: float = 10.0, lags: tuple[float, ...] = ()) -> LoadResult:
    return LoadResult("server", "2031-01-01T00:00:00+00:00", duration, len(records), records, lags)


@given(st.lists(st.floats(0, 1e6), min_size=2))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    for share in (1, 50, 90, 99):
        assert percentile(ordered, share / 100) == pytest.approx(cuts[share - 1], rel=1e-9, abs=1e-6)


def test_a_distribution_skips_what_is_missing_and_may_be_none() -> None:
    assert distribution([None, None]) is None
    spread = distribution([3.0, None, 1.0])
    assert spread is not None
    assert (spread.count, spread.mean, spread.p50, spread.max) == (2, 2.0, 2.0, 3.0)


def test_tpot_is_last_minus_first_over_tokens_minus_one() -> None:
    lumpy = record(0, gaps=(0.3,), num_tokens=4)
    assert lumpy.tpot == pytest.approx(0.1)
    assert record(0, gaps=()).tpot is None
    assert record(3, ttft=0.25).ttft == pytest.approx(0.25)
    assert lumpy.gaps == pytest.approx((0.3,))


@pytest.mark.parametrize(
    ("one", "meets"),
    [
        (record(0), True),
        (record(0, ttft=0.6), False),
        (record(0, gaps=(0.09, 0.09)), False),
        (record(0, gaps=()), True),
        (record(0, error="disconnected"), False),
        (record(0, end=None, error="unfinished"), False),
        (failed(0), False),
        (RequestRecord(0, 10, 3, 0.0, 0.0, end=1.0), False),
    ],
)
def test_what_meets_the_objectives(one: RequestRecord, meets: bool) -> None:
    assert met(one, SLO) is meets


def test_attainment_and_goodput_count_all_offered_requests() -> None:
    run = result(
        record(0), record(1), record(2, ttft=0.7), record(3, gaps=(0.1, 0.1)), failed(4), failed(5), failed(6, "timeout"),
        RequestRecord(7, 10, 3, 7.0), duration=10.0,
    )  # fmt: skip
    summary = summarise(run, SLO, num_workers=2)
    assert (summary.num_offered, summary.num_finished, summary.num_failed, summary.num_met) == (8, 4, 4, 2)
    assert (summary.num_late_first, summary.num_slow_tokens) == (1, 1)
    assert summary.attainment == 0.25
    assert (summary.goodput, summary.goodput_per_worker, summary.request_rate) == (0.2, 0.1, 0.4)
    assert summary.errors == (("http 429", 2), ("timeout", 1), ("no token", 1))
    assert summary.ttft is not None
    assert summary.ttft.count == 4
    assert (summary.output_tokens, summary.output_token_rate) == (12, 1.2)
    assert summary.itl is not None
    assert summary.itl.count == 8


def test_a_run_of_nothing_but_failures_still_has_figures() -> None:
    summary = summarise(result(failed(0), failed(1)), SLO)
    assert (summary.attainment, summary.goodput, summary.ttft, summary.goodput_per_worker) == (0.0, 0.0, None, None)
    assert summarise(result(), SLO).attainment == 0.0


def test_a_slow_client_is_named_and_a_quick_one_is_not() -> None:
    quick = summarise(result(record(0), lags=(0.001,) * 50), SLO)
    assert client_warning(quick, SLO) is None
    late = summarise(result(record(0, sent=0.2)), SLO)
    assert "sent late: p99 200 ms" in (client_warning(late, SLO) or "")
    asleep = summarise(result(record(0), lags=(0.1,) * 50), SLO)
    assert "read late: p99 100 ms" in (client_warning(asleep, SLO) or "")
