"""Admission policies: who is shed, and when to come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.request import Request, SamplingParams, WorkerRef
from baton.core.slo import Slo
from baton.core.view import ClusterView, Role, WorkerLoad, WorkerView
from baton.policy.admission import ADMISSION, MIN_RETRY_AFTER, predicted_ttft

SLO = Slo(ttft=1.0)
REQUEST = Request("r", (1,) * 100, SamplingParams(max_tokens=40), 0.0)


def prefill(pending: int = 0, rate: float = 1000.0, name: str = "p0") -> WorkerView:
    return WorkerView(WorkerRef(name, 1), Role.PREFILL, 16, WorkerLoad(prefill_rate=rate), pending_tokens=pending)


def decode(free_blocks: int = 100, role: Role = Role.DECODE, context: int = 0, **load: float) -> WorkerView:
    loads = WorkerLoad(free_blocks=free_blocks, total_blocks=100, **load)  # type: ignore[arg-type]
    return WorkerView(WorkerRef("d0", 1), role, 16, loads, context_tokens=context)


def test_none_admits_whatever_comes() -> None:
    assert ADMISSION["none"](0, SLO)(REQUEST, ClusterView(0.0, num_active=10**6)) is None


@pytest.mark.parametrize("name", ["queue_length", "slo"])
def test_the_queue_has_a_limit(name: str) -> None:
    admit = ADMISSION[name](5, SLO)
    assert admit(REQUEST, ClusterView(0.0, num_active=4)) is None
    refusal = admit(REQUEST, ClusterView(0.0, num_active=5))
    assert refusal is not None
    assert refusal.retry_after > 0
    assert "5" in refusal.reason


def test_slo_refuses_who_would_miss_the_objective_and_says_when_to_come_back() -> None:
    admit = ADMISSION["slo"](100, SLO)
    assert admit(REQUEST, ClusterView(0.0, (prefill(900),), (decode(),))) is None
    refusal = admit(REQUEST, ClusterView(0.0, (prefill(2400),), (decode(),)))
    assert refusal is not None
    assert refusal.retry_after == pytest.approx(1.5)


def test_slo_takes_the_least_busy_worker_and_the_requests_own_objective() -> None:
    admit = ADMISSION["slo"](100, SLO)
    view = ClusterView(0.0, (prefill(5000), prefill(1100, name="p1")), (decode(),))
    assert admit(replace(REQUEST, slo=Slo(ttft=2.0)), view) is None
    refusal = admit(replace(REQUEST, slo=Slo(ttft=1.19)), view)
    assert refusal is not None
    assert refusal.retry_after == MIN_RETRY_AFTER


def test_slo_admits_while_a_rate_is_unknown() -> None:
    admit = ADMISSION["slo"](100, SLO)
    assert admit(REQUEST, ClusterView(0.0, (prefill(10**6, rate=0.0),), (decode(),))) is None
    assert admit(REQUEST, ClusterView(0.0)) is None


def test_a_full_decode_pool_adds_the_time_until_there_is_room() -> None:
    full = decode(free_blocks=3, num_running=8, num_waiting=1, decode_step=0.05)
    # 0.1 s of prefill; one of 8 sequences ends every 0.05 * 40 / 8 = 0.25 s, and one reservation waits already.
    assert predicted_ttft(REQUEST, ClusterView(0.0, (prefill(),), (full,))) == pytest.approx(0.1 + 2 * 0.25)


def test_room_that_is_spoken_for_is_no_room() -> None:
    booked = decode(free_blocks=100, context=95 * 16, num_running=8, decode_step=0.05)
    assert predicted_ttft(REQUEST, ClusterView(0.0, (prefill(),), (booked,))) == pytest.approx(0.1 + 0.25)
    assert predicted_ttft(REQUEST, ClusterView(0.0, (prefill(),), (booked, decode()))) == pytest.approx(0.1)


def test_mixed_and_lonely_pools_are_judged_by_the_workers_that_prefill() -> None:
    mixed = decode(role=Role.MIXED, prefill_rate=200.0)
    assert predicted_ttft(REQUEST, ClusterView(0.0, mixed=(mixed,))) == pytest.approx(0.5)
    assert predicted_ttft(REQUEST, ClusterView(0.0, decode=(replace(mixed, role=Role.DECODE),))) == pytest.approx(0.5)
    assert predicted_ttft(REQUEST, ClusterView(0.0, (prefill(10**4),), (decode(),), (mixed,))) == pytest.approx(0.5)
