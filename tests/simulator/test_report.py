"""Figures from outcomes, and the verdict on what binds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from baton.core.slo import Slo
from baton.core.view import Role
from baton.simulator.cost import LinearCost
from baton.simulator.records import LinkUse, RequestOutcome, WorkerUse
from baton.simulator.report import OutcomeTally, SimulationReport, make_report, tally_of
from baton.simulator.setup import ClusterSetup, NetworkSetup, PoolSetup

SLO = Slo(ttft=0.5, tpot=0.05, attainment=0.9)
COST = LinearCost(step=0.01)
SETUP = ClusterSetup(
    (PoolSetup(Role.PREFILL, COST), PoolSetup(Role.DECODE, COST, replicas=2, max_num_seqs=8)),
    NetworkSetup(bandwidth=1000.0, node_bandwidth=math.inf),
    SLO,
)
PREFILL = WorkerUse("p0", "prefill", 5.0, 50, 5000, 0.0, 1.0, 0.3, 0.0, 0)
DECODE = WorkerUse("d0", "decode", 8.0, 800, 3200, 32.0, 2.0, 0.5, 0.0, 0)
LINK = LinkUse("node 0 out", 1500.0, 1.5, 700.0)


def outcome(index: int, **changes: object) -> RequestOutcome:
    """Arrives at its index / 2; 0.1 s of waiting, 0.1 s of prefill, 0.02 s of handoff, 0.18 s of decode: 11 tokens."""
    at = index / 2
    good = RequestOutcome(
        index, "", at, 100, 11, 0, "p0", "d0", prefill_start=at + 0.1, first_token=at + 0.2, landed=at + 0.22, end=at + 0.4,
        num_tokens=11,
    )  # fmt: skip
    return replace(good, **changes)  # type: ignore[arg-type]


def report(
    outcomes: Sequence[RequestOutcome],
    workers: Sequence[WorkerUse] = (PREFILL, DECODE, replace(DECODE, worker="d1", busy=4.0)),
    links: Sequence[LinkUse] = (LINK,),
) -> SimulationReport:
    return make_report(SETUP, tally_of(outcomes, SLO), 10.0, workers, links, num_devices=4)


GOOD = tuple(outcome(index) for index in range(20))


def test_the_figures_of_a_run_in_which_all_is_well() -> None:
    made = report(GOOD)
    assert (made.num_offered, made.num_finished, made.num_met, made.num_failed) == (20, 20, 20, 0)
    assert (made.attainment, made.goodput, made.goodput_per_device) == (1.0, 2.0, 0.5)
    assert made.offered_rate == pytest.approx(20 / 9.5)
    assert (made.input_tokens, made.output_tokens, made.output_token_rate) == (2000, 220, 22.0)
    assert made.ttft is not None
    assert made.tpot is not None
    assert made.ttft.p50 == pytest.approx(0.2, rel=0.01)
    assert made.tpot.p99 == pytest.approx(0.02, rel=0.01)
    means = {stage: spread.mean for stage, spread in made.stages}
    assert means == pytest.approx({"queue": 0.1, "prefill": 0.1, "handoff": 0.02, "decode": 0.18})
    assert made.tenants[0].num_offered == 20


def test_pools_and_links_are_averaged_over_workers_and_time() -> None:
    made = report(GOOD)
    prefill, decode = made.pools
    assert (prefill.role, prefill.num_workers, prefill.busy, prefill.kv_used) == ("prefill", 1, 0.5, 0.1)
    assert (decode.num_workers, decode.busy, decode.busiest, decode.batch_limit) == (2, pytest.approx(0.6), 0.8, 8)
    assert decode.mean_batch == pytest.approx(64 / 12)
    assert decode.tokens_per_second == 640.0
    (link,) = made.links
    assert (link.busy, link.rate, link.used, link.peak_backlog) == (0.15, 150.0, 0.15, 700.0)


def test_an_unlimited_link_is_not_used_up() -> None:
    (link,) = report(GOOD, links=[LinkUse("node 0 internal", 1e9, 0.0, 0.0)]).links
    assert link.used == 0.0


def test_failures_and_misses_count_against_attainment() -> None:
    late = outcome(20, prefill_start=10.5, first_token=10.6, landed=10.6, end=10.7)
    slow = outcome(21, end=12.0)
    shed = RequestOutcome(22, "", 11.0, 100, 11, end=11.0, error="resource_exhausted")
    cut = outcome(23, error="unavailable", attempts=3)
    silent = RequestOutcome(24, "", 12.0, 100, 11)
    made = report((*GOOD, late, slow, shed, cut, silent))
    assert (made.num_offered, made.num_finished, made.num_met) == (25, 22, 20)
    assert (made.num_late_first, made.num_slow_tokens, made.num_restarted) == (1, 1, 1)
    assert dict(made.errors) == {"resource_exhausted": 1, "unavailable": 1, "no token": 1}
    assert made.ttft is not None
    assert made.ttft.count == 22, "times are those of requests that ended well"


def test_a_request_of_one_token_has_no_tpot() -> None:
    made = report([outcome(0, num_tokens=1, output_tokens=1, end=0.2, landed=0.2)])
    assert (made.attainment, made.tpot) == (1.0, None)


def test_tenants_have_their_own_attainment() -> None:
    made = report([outcome(0, tenant="a"), outcome(1, tenant="a", error="x"), outcome(2, tenant="b")])
    assert [(each.tenant, each.num_offered, each.attainment) for each in made.tenants] == [("a", 2, 0.5), ("b", 1, 1.0)]


def test_a_run_without_requests_is_no_division_by_zero() -> None:
    empty = make_report(SETUP, OutcomeTally(SLO), 0.0, (), ())
    assert (empty.attainment, empty.goodput, empty.ttft, empty.pools, empty.stages) == (0.0, 0.0, None, (), ())
    assert not empty.bottleneck.binding


# ---- what binds ---------------------------------------------------------------------------------


def waits(index: int) -> RequestOutcome:
    at = index / 2
    return outcome(index, prefill_start=at + 1.0, first_token=at + 1.1, landed=at + 1.1, end=at + 1.3)


def slow(index: int, landed: float) -> RequestOutcome:
    at = index / 2
    return outcome(index, landed=at + landed, end=at + 2.2)


BUSY_PREFILL = replace(PREFILL, busy=9.9)
FULL_DECODE = replace(DECODE, kv_token_seconds=9.7, peak_kv=1.0, waiting_seconds=60.0)
BUSY_LINK = replace(LINK, busy=9.9)


@pytest.mark.parametrize(
    ("made", "resource", "said"),
    [
        (
            report([*map(waits, range(20))], [BUSY_PREFILL, DECODE]),
            "prefill compute",
            "prefilling devices are busy 99% of the time",
        ),
        (report([*map(waits, range(20))], [replace(PREFILL, waiting_seconds=30.0, peak_kv=1.0), DECODE]), "KV memory", "prefill"),
        (report([slow(i, 0.22) for i in range(20)]), "decode batch", "20 missed TPOT; the handoff is 1% of the time"),
        (report([slow(i, 1.9) for i in range(20)], links=[BUSY_LINK]), "link", "node 0 out moves bytes 99% of the time"),
        (report([slow(i, 1.9) for i in range(20)], [PREFILL, FULL_DECODE]), "KV memory", "decode workers are used to 97%"),
        (report([outcome(i, error="resource_exhausted") for i in range(20)]), "admission", "20 of 20 requests got no answer"),
    ],
)
def test_missed_objectives_are_followed_to_their_cause(made: SimulationReport, resource: str, said: str) -> None:
    verdict = made.bottleneck
    assert (verdict.binding, verdict.resource) == (True, resource)
    assert said in verdict.why
    assert {pressure.resource for pressure in verdict.pressures} == {"prefill compute", "decode batch", "KV memory", "link"}


@pytest.mark.parametrize(
    ("workers", "links", "resource"),
    [
        ([BUSY_PREFILL, DECODE], [LINK], "prefill compute"),
        ([PREFILL, DECODE], [BUSY_LINK], "link"),
        ([PREFILL, FULL_DECODE], [LINK], "KV memory"),
        ([PREFILL, replace(DECODE, decode_row_seconds=8 * 8.0)], [LINK], "decode batch"),
    ],
)
def test_where_objectives_are_met_the_resource_nearest_to_its_limit_is_named(workers, links, resource: str) -> None:
    verdict = report(GOOD, workers, links).bottleneck
    assert (verdict.binding, verdict.resource) == (False, resource)
    assert verdict.pressures[0].resource == resource
    assert [pressure.value for pressure in verdict.pressures] == sorted((p.value for p in verdict.pressures), reverse=True)


def test_a_mixed_pool_prefills_and_decodes() -> None:
    mixed = replace(DECODE, role="mixed", busy=9.8)
    setup = replace(SETUP, pools=(PoolSetup(Role.MIXED, COST, max_num_seqs=8),))
    made = make_report(setup, tally_of(map(waits, range(20)), SLO), 10.0, [mixed], ())
    assert made.bottleneck.resource == "prefill compute"


def test_a_full_batch_of_a_mixed_worker_keeps_prompts_waiting() -> None:
    full = replace(DECODE, role="mixed", busy=9.8, decode_row_seconds=9.8 * 7.8)
    setup = replace(SETUP, pools=(PoolSetup(Role.MIXED, COST, max_num_seqs=8),))
    made = make_report(setup, tally_of(map(waits, range(20)), SLO), 10.0, [full], ())
    assert made.bottleneck.resource == "decode batch"
    assert "7.8 of at most 8 sequences" in made.bottleneck.why


def test_a_day_of_outcomes_takes_no_more_memory_than_a_minute() -> None:
    tally = OutcomeTally(SLO)
    for index in range(20_000):
        tally.add(outcome(index, end=index / 2 + 0.4 + (index % 97) / 50))
    sketches = [tally.ttft, tally.tpot, tally.latency, *tally.stages.values()]
    assert sum(len(sketch._buckets) for sketch in sketches) < 2000
