"""Whole simulations: worked out by hand, against queueing theory, and with single steps against many at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.core.slo import Slo
from baton.simulator.records import RequestOutcome
from baton.simulator.setup import ClusterSetup, Failure, NetworkSetup
from baton.simulator.simulate import simulate
from baton.simulator.timeline import Timeline
from baton.simulator.workload.planned import PlannedRequest
from baton.tests.simulator.cluster_rig import BusyCost, FlatCost, cluster_setup, poisson, run
from hypothesis import given, settings
from hypothesis import strategies as st

# ---- by hand ------------------------------------------------------------------------------------


def test_one_request_passes_every_station_on_time() -> None:
    network = NetworkSetup(kv_bytes_per_token=10.0, bandwidth=400.0, latency=0.03, control=0.01)
    setup = cluster_setup(1, 1, network=network, block_size=4)
    result = simulate(setup, [PlannedRequest(0, 5.0, 16, 3)])
    (outcome,) = result.outcomes
    assert outcome.ok
    assert (outcome.prefill_worker, outcome.decode_worker) == ("prefill-0", "decode-0")
    assert outcome.prefill_start == pytest.approx(5.01)
    assert outcome.ttft == pytest.approx(0.01 + 1.0 + 0.01)  # there, one step, and back
    assert outcome.landed == pytest.approx(5.01 + 1.0 + 160 / 400 + 0.03)
    assert outcome.end == pytest.approx(5.01 + 1.0 + 160 / 400 + 0.03 + 2 * 0.25 + 0.01)
    assert outcome.tpot == pytest.approx((160 / 400 + 0.03 + 2 * 0.25) / 2)
    assert result.duration == outcome.end
    assert {link.name: link.bytes for link in result.links} == {"node 0 out": 160.0, "node 1 in": 160.0}


def test_chunks_leave_while_later_ones_are_computed() -> None:
    network = NetworkSetup(kv_bytes_per_token=1.0, bandwidth=8.0)
    setup = cluster_setup(1, 1, network=network, block_size=4, max_step_tokens=8)
    (outcome,) = simulate(setup, [PlannedRequest(0, 0.0, 24, 2)]).outcomes
    assert outcome.first_token == pytest.approx(3.0)
    assert outcome.landed == pytest.approx(4.0)  # the link takes as long as the device, one chunk behind it


def test_a_request_that_is_served_whole_is_never_transferred() -> None:
    (outcome,) = simulate(cluster_setup(0, 0, 1), [PlannedRequest(0, 0.0, 10, 5)]).outcomes
    assert (outcome.ttft, outcome.landed, outcome.end) == (1.0, 1.0, 2.0)
    assert outcome.prefill_worker == outcome.decode_worker == "mixed-0"


def test_host_work_between_steps_counts() -> None:
    (outcome,) = simulate(cluster_setup(0, 0, 1, overhead=0.05), [PlannedRequest(0, 0.0, 10, 5)]).outcomes
    assert outcome.end == pytest.approx(2.0 + 5 * 0.05)


def test_requests_of_one_moment_share_a_step() -> None:
    outcomes = simulate(cluster_setup(0, 0, 1), [PlannedRequest(i, 1.0, 10, 2) for i in range(4)]).outcomes
    assert [outcome.end for outcome in outcomes] == [2.25] * 4


def test_pipeline_stages_work_on_different_steps() -> None:
    setup = cluster_setup(0, 0, 1, cost=FlatCost(prefill=1.0, decode=1.0, stages=2), max_step_tokens=8)
    outcomes = simulate(setup, [PlannedRequest(i, 0.0, 8, 1) for i in range(3)]).outcomes
    assert [outcome.end for outcome in outcomes] == [2.0, 3.0, 4.0]
    setup = cluster_setup(0, 0, 1, cost=FlatCost(prefill=1.0, decode=1.0, stages=2))
    outcomes = simulate(setup, [PlannedRequest(i, 0.0, 8, 4) for i in range(4)]).outcomes
    # Prefilled together at 2; two micro-batches of two follow, a stage apart, three steps each.
    assert sorted(outcome.end for outcome in outcomes) == [8.0, 8.0, 9.0, 9.0]


def test_host_work_precedes_the_first_stage_alone() -> None:
    cost = FlatCost(prefill=1.0, decode=1.0, stages=2)
    setup = cluster_setup(0, 0, 1, cost=cost, max_step_tokens=8, overhead=0.25, token_overhead=0.125)
    outcomes = simulate(setup, [PlannedRequest(i, 0.0, 8, 1) for i in range(2)]).outcomes
    # 0.25 + 8 x 0.125 on the host, two stages; the second prompt follows when the first stage is free.
    assert [outcome.end for outcome in outcomes] == [3.25, 5.5]


def test_an_eager_pipeline_runs_ahead_of_a_slow_stage() -> None:
    setup = cluster_setup(1, 1, 0, cost=FlatCost(prefill=1.0, stages=2), eager_pipeline=True, max_step_tokens=8)
    outcomes = simulate(setup, [PlannedRequest(i, 0.0, 8, 1) for i in range(3)]).outcomes
    assert [outcome.end for outcome in outcomes] == [2.0, 3.0, 4.0]


def test_prefix_hits_are_not_computed_again() -> None:
    setup = cluster_setup(0, 0, 1, prefix_cache=True, block_size=32)
    workload = [
        PlannedRequest(0, 0.0, 1100, 2, (7, 8)),
        PlannedRequest(1, 9.0, 1100, 2, (7, 8)),
        PlannedRequest(2, 18.0, 600, 2, (7, 9)),
    ]
    first, again, other = simulate(setup, workload).outcomes
    assert (first.cached_tokens, again.cached_tokens, other.cached_tokens) == (0, 1024, 512)
    without = simulate(replace(setup, pools=(replace(setup.pools[0], prefix_cache=False),)), workload)
    assert [outcome.cached_tokens for outcome in without.outcomes] == [0, 0, 0]


# ---- queueing theory ------------------------------------------------------------------------------

PROMPT = 64


def lindley(arrivals: Iterable[float], service: float, latency: float = 0.0) -> list[float]:
    """Times in a queue that serves in order, `service` seconds each, and what follows takes `latency` more."""
    free_at, times = 0.0, []
    for at in arrivals:
        free_at = max(at, free_at) + service
        times.append(free_at + latency - at)
    return times


def check_queue(
    setup: ClusterSetup, rate: float, service: float, formula: float, latency: float = 0.0, replicas: int = 1
) -> None:
    """Prompts that fill a step each, of one output token: the simulation is the queue, and the queue obeys the formula."""
    outcomes = run(setup, poisson(1500, rate, PROMPT, 1)).outcomes
    by_worker: dict[str, list[RequestOutcome]] = {}
    for outcome in outcomes:
        by_worker.setdefault(outcome.prefill_worker, []).append(outcome)
    assert len(by_worker) == replicas
    for mine in by_worker.values():
        expected = lindley([outcome.arrival for outcome in mine], service, latency)
        assert [outcome.ttft for outcome in mine] == pytest.approx(expected)
    draws = Random(0)
    arrivals = accumulate(draws.expovariate(rate / replicas) for _ in range(300_000))
    times = lindley(arrivals, service, latency)
    assert sum(times) / len(times) == pytest.approx(formula, rel=0.02)


def md1(rate: float, service: float) -> float:
    return service + rate * service**2 / (2 * (1 - rate * service))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_single_device_is_an_md1_queue(load: float) -> None:
    check_queue(cluster_setup(0, 0, 1, max_step_tokens=PROMPT), load, 1.0, md1(load, 1.0))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_two_stages_are_a_queue_of_half_the_service_time(load: float) -> None:
    rate = 2 * load
    setup = cluster_setup(0, 0, 1, max_step_tokens=PROMPT, cost=FlatCost(prefill=0.5, decode=0.01, stages=2))
    check_queue(setup, rate, 0.5, 1.0 + rate / (4 * (2 - rate)), latency=0.5)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_tensor_parallelism_shortens_the_service_time(load: float) -> None:
    speedup = 1.7
    setup = cluster_setup(0, 0, 1, max_step_tokens=PROMPT, cost=FlatCost(prefill=1 / speedup))
    check_queue(setup, load * speedup, 1 / speedup, md1(load * speedup, 1 / speedup))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_random_routing_splits_a_poisson_stream(load: float) -> None:
    setup = cluster_setup(0, 0, 3, max_step_tokens=PROMPT, routing="random")
    check_queue(setup, 3 * load, 1.0, md1(load, 1.0), replicas=3)


def test_the_prefill_pool_of_a_split_cluster_is_the_same_queue() -> None:
    check_queue(cluster_setup(1, 1, max_step_tokens=PROMPT), 0.8, 1.0, md1(0.8, 1.0))


# ---- pressure and failures --------------------------------------------------------------------------


def test_a_full_decode_pool_grants_later_and_nothing_is_computed_twice() -> None:
    setup = cluster_setup(1, 1, block_size=4, num_blocks=12, cost=FlatCost(prefill=0.1))
    done = run(setup, [PlannedRequest(i, 0.0, 16, 4) for i in range(6)])
    assert all(outcome.ok and outcome.attempts == 1 for outcome in done.outcomes)
    prefill, decode = done.cluster.fleet.use(10.0)
    assert prefill.tokens == 6 * 16
    assert decode.tokens == 6 * 3
    assert decode.peak_kv > 0.8
    assert decode.waiting_seconds > 1.0


def test_a_preempted_sequence_goes_on_where_it_stopped() -> None:
    setup = cluster_setup(1, 1, block_size=4, num_blocks=8, cost=FlatCost(prefill=0.1))
    done = run(setup, [PlannedRequest(i, 0.1 * i, 4, 20) for i in range(4)])
    assert all(outcome.ok and outcome.num_tokens == 20 for outcome in done.outcomes)
    assert max(outcome.attempts for outcome in done.outcomes) > 1
    assert done.cluster.fleet.use(10.0)[1].preemptions > 0


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "mixed-0"])
@pytest.mark.parametrize("fast", [True, False])
def test_no_request_is_lost_with_a_worker(victim: str, fast: bool) -> None:
    failures = tuple(Failure(victim, at, noticed=0.2, restart=3.0) for at in (2.03, 7.77))
    network = NetworkSetup(kv_bytes_per_token=1e4, bandwidth=1e7, control=0.002)
    setup = cluster_setup(2, 2, 1, failures=failures, cost=BusyCost(), network=network, num_blocks=400)
    done = run(setup, poisson(300, 30.0, 300, 40), fast)
    assert all(outcome.ok and outcome.num_tokens == 40 for outcome in done.outcomes)
    assert max(outcome.attempts for outcome in done.outcomes) > 1


def test_without_any_worker_left_requests_end_as_unavailable() -> None:
    setup = cluster_setup(0, 0, 1, failures=(Failure("mixed-0", 1.5, restart=float("inf")),))
    done = run(setup, [PlannedRequest(0, 0.0, 10, 100), PlannedRequest(1, 5.0, 10, 100)])
    assert [outcome.error for outcome in done.outcomes] == ["unavailable"] * 2


def test_a_worker_that_is_down_for_long_is_waited_for() -> None:
    setup = cluster_setup(0, 0, 1, failures=(Failure("mixed-0", 1.5, restart=2000.0),))
    (outcome,) = run(setup, [PlannedRequest(0, 0.0, 10, 10)]).outcomes
    assert outcome.ok
    assert outcome.attempts == 2


def test_late_requests_are_given_up_and_shed_ones_never_begun() -> None:
    setup = cluster_setup(0, 0, 1, max_step_tokens=PROMPT, request_timeout=3.5)
    done = run(setup, [PlannedRequest(i, 0.0, PROMPT, 1) for i in range(6)])
    assert [outcome.error for outcome in done.outcomes] == [""] * 3 + ["deadline_exceeded"] * 3
    setup = cluster_setup(0, 0, 1, max_step_tokens=PROMPT, admission="slo", slo=Slo(ttft=2.5))
    done = run(setup, [PlannedRequest(i, 0.0, PROMPT, 1) for i in range(6)])
    assert [outcome.error for outcome in done.outcomes] == [""] * 2 + ["resource_exhausted"] * 4
    assert all(outcome.meets(Slo(ttft=2.5)) for outcome in done.outcomes[:2])


def test_a_request_that_fits_nowhere_ends_with_an_error() -> None:
    done = run(cluster_setup(1, 1, num_blocks=4, block_size=4), [PlannedRequest(0, 0.0, 100, 5), PlannedRequest(1, 0.0, 8, 3)])
    assert [outcome.error for outcome in done.outcomes] == ["internal", ""]


# ---- input that cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "field"),
    [
        (cluster_setup(0, 0, 1, routing="best"), "routing"),
        (cluster_setup(0, 0, 1, admission="best"), "admission"),
        (cluster_setup(0, 0, 1, ordering="best"), "ordering"),
        (cluster_setup(0, 0, 1, failures=(Failure("mixed-7", 1.0),)), "failures"),
        (cluster_setup(0, 0, 2, nodes=(1,)), "nodes"),
        (ClusterSetup(()), "pools"),
    ],
)
def test_an_impossible_setup_is_refused(setup: ClusterSetup, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        simulate(setup, [])
    assert caught.value.field == field


@pytest.mark.parametrize(
    "workload",
    [
        [PlannedRequest(0, 2.0, 5, 5), PlannedRequest(1, 1.0, 5, 5)],
        [PlannedRequest(0, 0.0, 0, 5)],
        [PlannedRequest(0, 0.0, 5, 0)],
    ],
)
def test_an_impossible_workload_is_refused(workload: list[PlannedRequest]) -> None:
    with pytest.raises(InvalidRequest):
        simulate(cluster_setup(0, 0, 1), workload)


def test_an_empty_workload_is_over_at_once() -> None:
    assert simulate(cluster_setup(1, 1), []).outcomes == ()


# ---- what comes out -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_outcomes_and_another_seed_others() -> None:
    def outcomes(seed: int) -> tuple[RequestOutcome, ...]:
        setup = cluster_setup(2, 2, routing="random", cost=BusyCost(), seed=seed)
        return simulate(setup, poisson(100, 20.0, 200, 20)).outcomes

    assert outcomes(1) == outcomes(1)
    assert outcomes(1) != outcomes(2)


def test_a_sink_takes_every_outcome_and_nothing_is_kept() -> None:
    taken: list[RequestOutcome] = []
    setup = cluster_setup(1, 1, cost=BusyCost())
    result = simulate(setup, poisson(50, 10.0, 100, 10), sink=taken.append)
    assert result.outcomes == ()
    assert tuple(sorted(taken, key=lambda outcome: outcome.index)) == simulate(setup, poisson(50, 10.0, 100, 10)).outcomes


def test_use_adds_up() -> None:
    setup = cluster_setup(1, 1, cost=FlatCost(prefill=1.0, decode=0.25), block_size=4, num_blocks=10)
    result = simulate(setup, [PlannedRequest(0, 0.0, 8, 9)])
    prefill, decode = result.workers
    assert (prefill.busy, prefill.steps, prefill.tokens, prefill.decode_row_seconds) == (1.0, 1, 8, 0.0)
    assert (decode.busy, decode.steps, decode.tokens, decode.decode_row_seconds) == (2.0, 8, 8, 2.0)
    assert prefill.kv_token_seconds == pytest.approx(0.2 * 1.0)
    assert result.duration == 3.0
    assert decode.peak_kv == 0.4  # 16 tokens; the 17th is never fed
    assert 0.3 * 3.0 < decode.kv_token_seconds < 0.4 * 3.0  # three blocks from the start on, head room among them


@pytest.mark.parametrize("fast", [True, False])
def test_a_timeline_shows_every_stage_and_every_step(fast: bool) -> None:
    class Spans(Timeline):
        def span(self, track: str, name: str, begin: float, end: float, **facts: float | int | str) -> None:
            super().span(track, name, begin, end, **facts)
            spans.append((track, name, begin, end, facts))

    spans: list[tuple[str, str, float, float, dict[str, float | int | str]]] = []
    network = NetworkSetup(kv_bytes_per_token=1.0, bandwidth=16.0)
    result = simulate(cluster_setup(1, 1, network=network), [PlannedRequest(0, 0.5, 8, 5)], timeline=Spans(), fast=fast)
    (outcome,) = result.outcomes
    stages = [(name, begin, end) for track, name, begin, end, _ in spans if track == "requests/0"]
    assert stages == [("queue", 0.5, 0.5), ("prefill", 0.5, 1.5), ("transfer", 1.5, 2.0), ("decode", 2.0, 3.0)]
    steps = [(track, name, facts["steps"]) for track, name, _, _, facts in spans if track.startswith("workers/")]
    assert steps[0] == ("workers/prefill-0", "prefill", 1)
    assert sum(int(number) for _, name, number in steps if name == "decode") == 4
    assert outcome.end == max(end for *_, end, _ in spans)


# ---- many steps at once ---------------------------------------------------------------------------------


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ClusterSetup, list[PlannedRequest]]:
    """Small clusters under all kinds of pressure, and what is offered to them."""
    prefix_cache = draw(st.booleans())
    network = NetworkSetup(
        kv_bytes_per_token=draw(st.sampled_from((0.0, 1e4))),
        bandwidth=draw(st.sampled_from((1e6, 1e8))),
        latency=draw(st.sampled_from((0.0, 1.3e-4))),
        control=draw(st.sampled_from((0.0, 4.7e-4))),
    )
    roles = draw(st.sampled_from(((1, 1, 0), (2, 2, 0), (1, 2, 1), (0, 0, 2))))
    setup = cluster_setup(
        *roles,
        cost=BusyCost(draw(st.sampled_from((1, 1, 1, 2, 3)))),
        network=network,
        num_blocks=draw(st.sampled_from((24, 60, 400))),
        block_size=draw(st.sampled_from((16, 32))),
        max_step_tokens=draw(st.sampled_from((64, 512))),
        max_num_seqs=draw(st.sampled_from((4, 64))),
        max_context=draw(st.sampled_from((0, 0, 900))),
        phases_apart=draw(st.booleans()),
        token_overhead=draw(st.sampled_from((0.0, 1e-7))),
        prefix_cache=prefix_cache,
        overhead=draw(st.sampled_from((0.0, 1e-3))),
        admission=draw(st.sampled_from(("none", "queue_length"))),
        max_queue=25,
        local_prefill_tokens=draw(st.sampled_from((0, 60))),
        failures=draw(st.sampled_from(((), (Failure("decode-0" if roles[1] else "mixed-0", 0.61, 0.1, 0.4),)))),
    )
    seed = draw(st.integers(0, 1000))
    blocks = ((1,), (1, 2), (3,), ()) if prefix_cache else ((),)
    rate = draw(st.sampled_from((15.0, 60.0)))
    workload = [
        replace(
            planned,
            input_tokens=1 + (planned.index * 7919 + seed) % 290,
            output_tokens=1 + (planned.index * 104729 + seed) % 70,
            block_ids=blocks[planned.index % len(blocks)],
        )
        for planned in poisson(30, rate, 1, 1, seed)
    ]
    return setup, workload


@given(clusters())
@settings(max_examples=60, deadline=None)
def test_many_steps_at_once_change_no_outcome(drawn: tuple[ClusterSetup, list[PlannedRequest]]) -> None:
    setup, workload = drawn
    at_once, one_by_one = run(setup, workload).outcomes, run(setup, workload, fast=False).outcomes
    for fast, slow in zip(at_once, one_by_one, strict=True):
        times = ("prefill_start", "first_token", "landed", "end")
        assert replace(fast, **dict.fromkeys(times)) == replace(slow, **dict.fromkeys(times))
        for time in times:
            expected = getattr(slow, time)
            assert getattr(fast, time) == (expected and pytest.approx(expected, rel=1e-9)), time
