"""The undisturbed life of requests, admission, waiting, cancelling and deadlines: events in, actions out."""

from __future__ import annotations

import itertools

import pytest
from baton.core.request import Attempt
from baton.core.slo import Slo
from baton.router import events as ev
from baton.tests.router.lifecycle_driver import D0, D1, M0, P0, P1, Driver, completes, ref, without_timers

R1, R2 = Attempt("r", 1), Attempt("r", 2)


def test_a_split_request_from_arrival_to_end() -> None:
    driver = Driver("p0", "d0", lease=3.0)
    driver.report(P0, prefill_rate=100.0)
    assert driver.arrive() == [
        ev.SetTimer(ev.Timer("deadline", "r"), 600.0),
        ev.SendReserve(D0, R1, P0),
        ev.SendPrefill(P0, R1, D0),
        ev.SetTimer(ev.Timer("lease"), 1.0),
        ev.SetTimer(ev.Timer("stage", "r", 1, "prefill"), 2.0),
    ]
    assert driver.counters(P0) == (1, 32, 32)
    assert driver.counters(D0) == (1, 0, 32)
    assert driver.says(ev.Granted, D0, R1, b"ticket") == [ev.SendGrant(P0, R1, b"ticket")]
    assert driver.says(ev.FirstToken, P0, R1) == [ev.SetTimer(ev.Timer("stage", "r", 1, "handover"), 2.0)]
    assert driver.counters(P0) == (1, 0, 32)
    assert driver.counters(D0) == (1, 0, 33)
    assert driver.says(ev.HandedOver, P0, R1) == []
    assert driver.counters(P0) == (0, 0, 0)
    assert driver.says(ev.Adopted, D0, R1) == [ev.SetTimer(ev.Timer("stage", "r", 1, "decode"), 2.0)]
    assert driver.says(ev.Progress, D0, R1, 10) == []
    assert driver.counters(D0) == (1, 0, 42)
    assert driver.says(ev.Finished, D0, R1) == [ev.Complete("r")]
    assert driver.counters(D0) == (0, 0, 0)
    assert driver.lifecycle.num_active == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_messages_of_the_two_workers_come_in_any_order(order: tuple[int, ...]) -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    said = [(ev.Granted, D0, b"t"), (ev.FirstToken, P0), (ev.HandedOver, P0), (ev.Adopted, D0)]
    for index in order:
        kind, worker, *rest = said[index]
        driver.says(kind, worker, R1, *rest)
    assert driver.stage() == "decode"
    assert driver.counters(P0) == (0, 0, 0)
    assert driver.says(ev.Finished, D0, R1) == [ev.Complete("r")]


def test_what_other_routers_have_placed_counts_too() -> None:
    """As each heartbeat tells it, beside this router's own share, for every decision."""
    driver = Driver("p0", "p1", "d0", "d1", routing="least_loaded")
    driver.report(P0, prefill_rate=100.0, others_assigned=2, others_pending_tokens=900, others_context_tokens=950)
    driver.report(D1, others_assigned=3, others_context_tokens=800)
    assert without_timers(driver.arrive()) == [ev.SendReserve(D0, R1, P1), ev.SendPrefill(P1, R1, D0)]
    assert (driver.counters(P0), driver.counters(D1)) == ((2, 900, 950), (3, 0, 800))
    driver.report(P0, prefill_rate=100.0)
    assert driver.counters(P0) == (0, 0, 0)


def test_a_prefill_behind_those_of_other_routers_may_take_longer() -> None:
    driver = Driver("p0", "d0", stage_floor=2.0, stage_factor=3.0)
    driver.report(P0, prefill_rate=16.0, others_pending_tokens=160)
    assert driver.arrive()[-1] == ev.SetTimer(
        ev.Timer("stage", "r", 1, "prefill"), 36.0
    )  # 3 x (160 + 32) tokens at 16 per second


def test_a_grant_after_the_handover_goes_nowhere() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.HandedOver, P0, R1)
    assert without_timers(driver.says(ev.Granted, D0, R1, b"t")) == []


def test_a_second_grant_is_not_passed_on() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    assert driver.says(ev.Granted, D0, R1, b"t") == [ev.SendGrant(P0, R1, b"t")]
    assert driver.says(ev.Granted, D0, R1, b"t") == []


def test_a_sequence_that_ends_with_its_first_token_releases_the_reservation() -> None:
    driver = Driver("p0", "d0")
    driver.arrive(max_tokens=1)
    driver.says(ev.FirstToken, P0, R1)
    assert driver.says(ev.Finished, P0, R1) == [ev.SendAbort(D0, R1), ev.Complete("r")]


def test_a_sequence_that_ends_before_its_handover_was_acknowledged_releases_the_prefill_worker() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.FirstToken, P0, R1)
    driver.says(ev.Adopted, D0, R1)
    assert driver.says(ev.Finished, D0, R1) == [ev.SendAbort(P0, R1), ev.Complete("r")]


def test_progress_at_the_decode_worker_implies_the_first_token() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.Adopted, D0, R1)
    driver.says(ev.Progress, D0, R1, 8)
    assert driver.stage() == "decode"
    assert driver.counters(P0) == (1, 0, 32)


# ---- whole requests ------------------------------------------------------------------------------


def test_a_mixed_worker_serves_whole_requests() -> None:
    driver = Driver("m0", head_room=8)
    assert without_timers(driver.arrive()) == [ev.SendRun(M0, R1)]
    assert driver.counters(M0) == (1, 32, 40)
    driver.says(ev.FirstToken, M0, R1)
    assert driver.counters(M0) == (1, 0, 40)
    assert driver.says(ev.Finished, M0, R1) == [ev.Complete("r")]
    assert driver.counters(M0) == (0, 0, 0)


def test_short_prompts_are_prefilled_at_the_decode_worker() -> None:
    driver = Driver("p0", "d0", local_prefill_tokens=32)
    assert without_timers(driver.arrive("a", prompt=32)) == [ev.SendRun(D0, Attempt("a", 1))]
    assert without_timers(driver.arrive("b", prompt=33))[0] == ev.SendReserve(D0, Attempt("b", 1), P0)


def test_without_a_prefill_pool_the_decode_pool_serves_whole_requests_until_one_joins() -> None:
    driver = Driver("d0")
    assert without_timers(driver.arrive("a")) == [ev.SendRun(D0, Attempt("a", 1))]
    driver.join("p0")
    assert without_timers(driver.arrive("b"))[0] == ev.SendReserve(D0, Attempt("b", 1), P0)


def test_without_a_decode_pool_the_prefill_pool_serves_whole_requests() -> None:
    driver = Driver("p0")
    assert without_timers(driver.arrive()) == [ev.SendRun(P0, R1)]


# ---- waiting and admission -----------------------------------------------------------------------


def test_requests_wait_for_a_worker_in_order() -> None:
    driver = Driver()
    assert driver.arrive("a") == [ev.SetTimer(ev.Timer("deadline", "a"), 600.0)]
    driver.arrive("b")
    assert (driver.lifecycle.num_pending, driver.lifecycle.num_active) == (2, 2)
    runs = [action for action in driver.join("m0") if isinstance(action, ev.SendRun)]
    assert [run.attempt.request_id for run in runs] == ["a", "b"]
    assert driver.lifecycle.num_pending == 0


def test_resumed_requests_come_before_new_ones() -> None:
    driver = Driver("d0")
    driver.arrive("old")
    driver.lose(D0)
    driver.arrive("new")
    driver.arrive("newer")
    runs = [action.attempt for action in driver.join("m0") if isinstance(action, ev.SendRun)]
    assert runs == [Attempt("old", 2), Attempt("new", 1), Attempt("newer", 1)]


def test_a_resumed_request_overtakes_one_that_waited_before_it() -> None:
    driver = Driver("d0")
    driver.arrive("served")
    driver.handle(ev.WorkerDraining(0.0, D0))
    driver.arrive("waiting")
    driver.says(ev.Preempted, D0, Attempt("served", 1))
    runs = [action.attempt for action in driver.join("m0") if isinstance(action, ev.SendRun)]
    assert runs == [Attempt("served", 2), Attempt("waiting", 1)]


def test_a_refused_request_ends_before_any_work() -> None:
    driver = Driver("p0", "d0", admission="queue_length", max_queue=1)
    driver.arrive("a")
    (complete,) = driver.arrive("b")
    assert isinstance(complete, ev.Complete)
    assert (complete.error, complete.retry_after > 0) == ("resource_exhausted", True)
    assert driver.lifecycle.num_active == 1


def test_admission_judges_by_the_configured_objective() -> None:
    driver = Driver("p0", "d0", admission="slo", slo=Slo(ttft=0.5))
    driver.report(P0, prefill_rate=100.0)
    assert completes(driver.arrive("short", prompt=40)) == []
    (complete,) = driver.arrive("long", prompt=60)
    assert isinstance(complete, ev.Complete)
    assert complete.retry_after == pytest.approx(0.5)
    assert completes(driver.arrive("patient", prompt=60, slo=Slo(ttft=5.0))) == []


def test_an_id_in_use_is_refused_and_disturbs_nobody() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    (complete,) = driver.arrive()
    assert isinstance(complete, ev.Complete)
    assert complete.error == "invalid_argument"
    assert driver.says(ev.Granted, D0, R1, b"t") == [ev.SendGrant(P0, R1, b"t")]


def test_draining_workers_get_nothing_new_and_finish_what_they_have() -> None:
    driver = Driver("p0", "d0", "d1", routing="join_shortest_queue")
    driver.arrive("r", draw=0.0)
    driver.handle(ev.WorkerDraining(0.0, D0))
    for name in "abc":
        assert without_timers(driver.arrive(name))[0] == ev.SendReserve(D1, Attempt(name, 1), P0)
    assert driver.says(ev.Granted, D0, R1, b"t") == [ev.SendGrant(P0, R1, b"t")]
    assert driver.says(ev.Finished, D0, R1) == [ev.SendAbort(P0, R1), ev.Complete("r")]


# ---- cancelling and deadlines ----------------------------------------------------------------------


def test_cancel_reaches_both_workers() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    aborts = [ev.SendAbort(D0, R1), ev.SendAbort(P0, R1)]
    assert driver.cancel() == [*aborts, ev.Complete("r", "cancelled", "request r was cancelled")]
    assert driver.counters(P0) == driver.counters(D0) == (0, 0, 0)
    assert driver.cancel() == []


def test_cancel_after_the_handover_reaches_the_decode_worker_alone() -> None:
    driver = Driver("p0", "d0")
    driver.decoding()
    assert driver.cancel(done=True) == [ev.SendAbort(D0, R1), ev.Complete("r")]


def test_cancel_of_a_waiting_request() -> None:
    driver = Driver()
    driver.arrive()
    assert [complete.error for complete in completes(driver.cancel())] == ["cancelled"]
    assert driver.lifecycle.num_pending == 0
    assert driver.join("m0") == []


def test_a_deadline_ends_the_request_everywhere() -> None:
    driver = Driver("p0", "d0", request_timeout=5.0)
    assert driver.arrive()[0] == ev.SetTimer(ev.Timer("deadline", "r"), 5.0)
    driver.now = 5.0
    actions = driver.fire("deadline", "r")
    assert actions[:2] == [ev.SendAbort(D0, R1), ev.SendAbort(P0, R1)]
    assert [complete.error for complete in completes(actions)] == ["deadline_exceeded"]
    assert driver.fire("deadline", "r") == []


def test_the_clients_own_deadline_drops_queued_work() -> None:
    driver = Driver()
    assert driver.arrive(deadline=2.0) == [ev.SetTimer(ev.Timer("deadline", "r"), 2.0)]
    driver.now = 2.0
    assert [complete.error for complete in completes(driver.fire("deadline", "r"))] == ["deadline_exceeded"]
    assert driver.lifecycle.num_pending == 0


def test_a_request_that_arrives_too_late_is_not_started() -> None:
    driver = Driver("p0", "d0")
    driver.now = 3.0
    actions = driver.arrive(deadline=3.0)
    assert [complete.error for complete in completes(actions)] == ["deadline_exceeded"]
    assert len(actions) == 1


def test_the_deadline_timer_of_an_earlier_request_with_the_same_id_ends_nobody() -> None:
    driver = Driver("p0", "d0", request_timeout=5.0)
    driver.arrive()
    driver.cancel()
    driver.now = 4.0
    driver.arrive()
    driver.now = 5.0
    assert driver.fire("deadline", "r") == [ev.SetTimer(ev.Timer("deadline", "r"), 9.0)]
    assert driver.lifecycle.num_active == 1


# ---- messages that are not believed ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ev.FirstToken, ev.HandedOver, ev.Finished, ev.Preempted])
def test_messages_of_unknown_requests_and_foreign_workers_are_ignored(kind: type[ev.FirstToken]) -> None:
    driver = Driver("p0", "p1", "d0", "d1")
    driver.arrive()
    before = driver.lifecycle.snapshot()
    assert driver.says(kind, P0, Attempt("unknown", 1)) == []
    assert driver.says(kind, P0, Attempt("r", 0)) == []
    assert driver.says(kind, P1, R1) == []
    assert driver.says(kind, D1, R1) == []
    assert driver.lifecycle.snapshot() == before


def test_stale_grants_and_adoptions_are_aborted_so_that_nothing_strands() -> None:
    driver = Driver("p0", "d0")
    assert driver.says(ev.Granted, D0, Attempt("unknown", 1), b"t") == [ev.SendAbort(D0, Attempt("unknown", 1))]
    driver.arrive()
    driver.says(ev.AttemptFailed, P0, R1, "no room")
    assert driver.says(ev.Granted, D0, R1, b"t") == [ev.SendAbort(D0, R1)]
    assert driver.says(ev.Adopted, D0, R1) == [ev.SendAbort(D0, R1)]
    assert driver.says(ev.Adopted, ref("d0", 9), R1) == []  # not connected: nobody to tell


def test_a_finish_of_a_stale_attempt_does_not_end_the_request() -> None:
    driver = Driver("p0", "d0")
    driver.decoding()
    driver.says(ev.Preempted, D0, R1)
    assert driver.says(ev.Finished, D0, R1) == []
    assert driver.lifecycle.snapshot()["r"].attempt == R2


# ---- leases ------------------------------------------------------------------------------------------


def test_tickets_are_renewed_at_both_ends_while_a_handoff_is_open() -> None:
    driver = Driver("p0", "d0", lease=3.0)
    driver.arrive("a")
    assert ev.SetTimer(ev.Timer("lease"), 1.0) not in driver.arrive("b")  # one timer for all
    a, b = Attempt("a", 1), Attempt("b", 1)
    driver.now = 1.0
    again = ev.SetTimer(ev.Timer("lease"), 2.0)
    assert driver.fire("lease") == [ev.SendRenew(P0, (a, b)), ev.SendRenew(D0, (a, b)), again]
    driver.says(ev.Adopted, D0, a)
    driver.says(ev.HandedOver, P0, b)
    driver.now = 2.0
    assert driver.fire("lease")[:-1] == [ev.SendRenew(D0, (b,))]
    driver.says(ev.Adopted, D0, b)
    driver.now = 3.0
    assert driver.fire("lease") == []  # and the timer stops
    assert driver.fire("lease") == []
    assert ev.SetTimer(ev.Timer("lease"), 4.0) in driver.arrive("c")


def test_nothing_is_renewed_for_whole_requests() -> None:
    driver = Driver("m0")
    assert ev.Timer("lease") not in [action.timer for action in driver.arrive() if isinstance(action, ev.SetTimer)]


def test_views_count_decisions_and_follow_reports() -> None:
    driver = Driver("p0", "d0")
    driver.report(D0, num_running=3)
    driver.report(ref("d0", 8), num_running=9)  # another life of d0: unknown
    view = driver.lifecycle.view(1.0, draw=0.5)
    assert (view.now, view.draw, view.sequence_number) == (1.0, 0.5, 0)
    assert view.decode[0].load.num_running == 3
    driver.arrive()
    assert driver.lifecycle.view(1.0).sequence_number == 1
