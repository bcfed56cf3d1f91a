"""Metrics: one registry per object, labels, stages, samples read at the scrape."""

from __future__ import annotations

import pytest
from baton.observability.metrics import Metrics
from baton.observability.records import Place, RequestRecord, SequenceRecord, StageTimes, WorkerSample
from prometheus_client.parser import text_string_to_metric_families

PREFILL, DECODE = Place("prefill", "p0"), Place("decode", "d0")
STAGES = StageTimes(ttft=1.0, queue=0.75, prefill=0.25, handoff=0.1, first_decode=0.2, tpot=0.05, total=3.0)


def values(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def labels(place: Place, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"pool": place.pool, "worker": place.worker, **more}.items()))


def record(outcome: str = "ok", **sequence: object) -> RequestRecord:
    fields: dict[str, object] = {
        "stages": STAGES,
        "output_tokens": 41,
        "cached_tokens": 32,
        "attempts": 1,
        "finish": "stop",
        "first": PREFILL,
        "rest": DECODE,
    }
    return RequestRecord("r", "", "", outcome, "", 100, (SequenceRecord(**(fields | sequence)),))


def test_finished_request_is_split_into_stages() -> None:
    metrics = Metrics()
    metrics.request_ended(record())
    seen = values(metrics)
    assert seen["baton_requests_total", (("outcome", "ok"),)] == 1
    assert seen["baton_prompt_tokens_total", ()] == 100
    assert seen["baton_cached_tokens_total", ()] == 32
    assert seen["baton_ttft_seconds_sum", labels(PREFILL)] == 1.0
    assert seen["baton_tpot_seconds_sum", labels(DECODE)] == 0.05
    assert seen["baton_e2e_seconds_sum", ()] == 3.0
    for stage, place, seconds in (
        ("queue", PREFILL, 0.75),
        ("prefill", PREFILL, 0.25),
        ("handoff", DECODE, 0.1),
        ("first_decode", DECODE, 0.2),
    ):
        assert seen["baton_stage_seconds_sum", labels(place, stage=stage)] == seconds


def test_request_without_a_token_has_an_outcome_only() -> None:
    metrics = Metrics()
    metrics.request_ended(record("deadline_exceeded", stages=StageTimes(total=5.0), first=None, rest=None))
    seen = values(metrics)
    assert seen["baton_requests_total", (("outcome", "deadline_exceeded"),)] == 1
    assert seen["baton_e2e_seconds_count", ()] == 0


def test_tokens_attempts_and_handoffs() -> None:
    metrics = Metrics()
    metrics.tokens(PREFILL, 1, None)
    metrics.tokens(DECODE, 2, 0.04)
    metrics.attempt(None)
    metrics.attempt("worker_lost")
    metrics.handoff("shm", 1 << 20, 0.002, 0.001)
    metrics.worker_lost(DECODE)
    seen = values(metrics)
    assert seen["baton_output_tokens_total", labels(DECODE)] == 2
    assert seen["baton_itl_seconds_count", labels(DECODE)] == 2
    assert seen["baton_itl_seconds_sum", labels(DECODE)] == 0.04
    assert seen["baton_itl_seconds_count", labels(PREFILL)] == 0
    assert seen["baton_attempts_total", ()] == 2
    assert seen["baton_retries_total", (("reason", "worker_lost"),)] == 1
    assert seen["baton_handoff_bytes_sum", (("transport", "shm"),)] == 1 << 20
    assert seen["baton_handoff_exposed_seconds_sum", (("transport", "shm"),)] == 0.001
    assert seen["baton_workers_lost_total", labels(DECODE)] == 1


def test_gauges_are_read_at_the_scrape_and_leave_no_stale_series() -> None:
    metrics, samples, active = Metrics(), [], [5]
    metrics.observe_cluster(lambda: active[0], lambda: 2, lambda: True, lambda: samples)
    samples.append(WorkerSample(DECODE, True, 3, 1, 2, 90, 100, 4, 6, 77, None))
    seen = values(metrics)
    assert seen["baton_requests_active", ()] == 5
    assert seen["baton_requests_pending", ()] == 2
    assert seen["baton_ready", ()] == 1
    assert seen["baton_worker_free_blocks", labels(DECODE)] == 90
    assert seen["baton_worker_quarantined_blocks", labels(DECODE)] == 4
    assert ("baton_worker_heartbeat_age_seconds", labels(DECODE)) not in seen
    samples.clear()
    active[0] = 0
    seen = values(metrics)
    assert seen["baton_requests_active", ()] == 0
    assert ("baton_worker_free_blocks", labels(DECODE)) not in seen


def test_registries_are_separate() -> None:
    first, second = Metrics(), Metrics()
    first.attempt(None)
    assert values(second)["baton_attempts_total", ()] == 0


def test_gaps_of_a_step_are_counted_together() -> None:
    metrics = Metrics()
    metrics.step(DECODE, 6, {0.01: 4, 0.0101: 1, 9.0: 1})
    seen = values(metrics)
    assert seen["baton_output_tokens_total", labels(DECODE)] == 6
    assert seen["baton_itl_seconds_count", labels(DECODE)] == 6
    assert seen["baton_itl_seconds_sum", labels(DECODE)] == pytest.approx(4 * 0.01 + 0.0101 + 9.0)
    buckets = {le: seen["baton_itl_seconds_bucket", labels(DECODE, le=le)] for le in ("0.005", "0.01", "0.015", "2.5")}
    assert buckets == {"0.005": 0, "0.01": 4, "0.015": 5, "2.5": 5}  # a bound belongs to its bucket
