"""Every row of "When something goes wrong" (ARCHITECTURE §4) as far as the lifecycle decides it: events in, actions out."""

from __future__ import annotations

import pytest
from baton.core.request import Attempt
from baton.router import events as ev
from baton.tests.router.lifecycle_driver import D0, D1, M0, P0, P1, Driver, completes, ref, without_timers

R1, R2, R3 = Attempt("r", 1), Attempt("r", 2), Attempt("r", 3)


# ---- prefill worker dies -------------------------------------------------------------------------


def test_prefill_worker_dies_the_request_is_prefilled_elsewhere() -> None:
    driver = Driver("p0", "p1", "d0")
    driver.arrive()
    assert without_timers(driver.lose(P0, "killed")) == [
        ev.KillWorker(P0, "killed"),
        ev.SendAbort(D0, R1),
        ev.SendReserve(D0, R2, P1),
        ev.SendPrefill(P1, R2, D0),
    ]


def test_prefill_worker_dies_with_the_first_token_out_but_not_all_kv_landed() -> None:
    driver = Driver("p0", "p1", "d0")
    driver.arrive()
    driver.says(ev.Granted, D0, R1, b"t")
    driver.says(ev.FirstToken, P0, R1)
    driver.lose(P0)
    assert driver.counters(P1) == (1, 33, 33)  # the token that the client has is prefilled with the prompt


def test_prefill_worker_dies_after_the_adoption_nothing_happens_to_the_request() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.FirstToken, P0, R1)
    driver.says(ev.Adopted, D0, R1)
    assert driver.lose(P0) == [ev.KillWorker(P0, "no heartbeat")]
    assert driver.says(ev.Finished, D0, R1) == [ev.Complete("r")]


def test_prefill_worker_dies_after_the_adoption_with_its_first_token_unsent() -> None:
    driver = Driver("p0", "p1", "d0")
    driver.arrive()
    driver.says(ev.Adopted, D0, R1)
    assert ev.SendReserve(D0, R2, P1) in driver.lose(P0)


def test_prefill_worker_dies_after_its_handover_while_the_adoption_is_on_its_way() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.FirstToken, P0, R1)
    driver.says(ev.HandedOver, P0, R1)
    assert driver.lose(P0) == [ev.KillWorker(P0, "no heartbeat")]
    driver.says(ev.Adopted, D0, R1)
    assert driver.stage() == "decode"


def test_the_last_prefill_worker_dies_the_decode_worker_serves_the_request_whole() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    assert without_timers(driver.lose(P0))[1:] == [ev.SendAbort(D0, R1), ev.SendRun(D0, R2)]


# ---- decode worker dies --------------------------------------------------------------------------


def test_decode_worker_dies_mid_stream_the_request_resumes_elsewhere() -> None:
    driver = Driver("p0", "d0", "d1")
    driver.decoding()
    driver.says(ev.Progress, D0, R1, 10)
    assert without_timers(driver.lose(D0)) == [
        ev.KillWorker(D0, "no heartbeat"),
        ev.SendReserve(D1, R2, P0),
        ev.SendPrefill(P0, R2, D1),
    ]
    assert driver.counters(P0) == (1, 42, 42)


def test_the_only_decode_worker_dies_the_prefill_worker_takes_over() -> None:
    driver = Driver("p0", "d0")
    driver.decoding()
    assert without_timers(driver.lose(D0))[1:] == [ev.SendRun(P0, R2)]


def test_everybody_dies_the_request_waits_for_a_new_worker() -> None:
    driver = Driver("p0", "d0")
    driver.decoding()
    driver.lose(D0)
    assert without_timers(driver.lose(P0)) == [ev.KillWorker(P0, "no heartbeat")]
    assert (driver.stage(), driver.lifecycle.num_pending) == ("pending", 1)
    assert without_timers(driver.join("d0", epoch=2)) == [ev.SendRun(ref("d0", 2), R3)]


# ---- lost workers are killed; their death frees quarantine ---------------------------------------


def test_a_confirmed_death_is_told_to_every_live_worker() -> None:
    driver = Driver("p0", "d0", "d1", "m0")
    assert driver.lose(P0, "hangs") == [ev.KillWorker(P0, "hangs")]
    gone = [ev.SendGone(D0, P0), ev.SendGone(D1, P0), ev.SendGone(M0, P0)]
    assert driver.handle(ev.WorkerConfirmedDead(1.0, P0)) == gone
    assert driver.handle(ev.WorkerConfirmedDead(1.0, P0)) == []  # told once
    assert driver.lose(P0) == []


def test_a_death_that_is_confirmed_first_needs_no_kill() -> None:
    driver = Driver("p0", "p1", "d0")
    driver.arrive()
    actions = driver.handle(ev.WorkerConfirmedDead(1.0, P0))
    assert ev.SendReserve(D0, R2, P1) in actions
    assert ev.SendGone(D0, P0) in actions
    assert not any(isinstance(action, ev.KillWorker) for action in actions)


def test_a_worker_that_joins_later_hears_of_earlier_deaths() -> None:
    driver = Driver()  # a router that has just restarted: d0 may hold blocks that p0 could have written
    driver.handle(ev.WorkerConfirmedDead(0.0, P0))
    assert driver.join("d0") == [ev.SendGone(D0, P0)]


def test_a_new_life_of_a_worker_means_that_the_old_one_is_lost() -> None:
    driver = Driver("p0", "d0")
    driver.decoding()
    new = ref("d0", 2)
    actions = without_timers(driver.join("d0", epoch=2))
    assert actions == [
        ev.KillWorker(D0, f"{new} took its place"),
        ev.SendReserve(new, R2, P0),
        ev.SendPrefill(P0, R2, new),
    ]


def test_a_hanging_worker_that_wakes_up_must_come_back_as_a_new_life() -> None:
    driver = Driver("p0", "d0")
    driver.lose(D0)
    (kill,) = driver.join("d0", epoch=1)
    assert isinstance(kill, ev.KillWorker)
    driver.handle(ev.WorkerConfirmedDead(1.0, D0))
    assert driver.join("d0", epoch=1) == []
    assert driver.lifecycle.view(1.0).decode == ()
    driver.join("d0", epoch=2)
    assert [worker.ref for worker in driver.lifecycle.view(1.0).decode] == [ref("d0", 2)]


def test_reports_of_lost_workers_are_ignored() -> None:
    driver = Driver("p0", "d0", "d1")
    driver.decoding()
    driver.lose(D0)
    assert driver.report(D0) == []
    assert driver.says(ev.Finished, D0, R1) == []
    assert driver.handle(ev.WorkerDraining(1.0, D0)) == []
    assert driver.stage() == "prefill"


# ---- failed attempts: damaged KV, refused pushes, broken streams ----------------------------------


def test_damaged_kv_is_recomputed() -> None:
    driver = Driver("p0", "p1", "d0", "d1")
    driver.arrive()
    actions = without_timers(driver.says(ev.AttemptFailed, D0, R1, "KV arrived damaged"))
    assert actions[:2] == [ev.SendAbort(D0, R1), ev.SendAbort(P0, R1)]
    reserve = actions[2]
    assert isinstance(reserve, ev.SendReserve)
    assert (reserve.worker, reserve.attempt) == (D1, R2)  # not where it failed


def test_the_failed_worker_is_used_again_when_there_is_no_other() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    assert ev.SendReserve(D0, R2, P0) in driver.says(ev.AttemptFailed, D0, R1, "checksum")


def test_a_failure_that_cannot_be_retried_ends_the_request() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    actions = driver.says(ev.AttemptFailed, D0, R1, "never fits", False)
    assert ev.SendAbort(P0, R1) in actions
    (complete,) = completes(actions)
    assert complete.error == "internal"
    assert "never fits" in complete.message


def test_repeated_failures_back_off_and_end_with_the_last_reason() -> None:
    driver = Driver("m0", max_attempts=4)
    driver.arrive()
    waits = []
    for number in range(1, 4):
        actions = driver.says(ev.AttemptFailed, M0, Attempt("r", number), f"broken {number}")
        timers = [action for action in actions if isinstance(action, ev.SetTimer) and action.timer.stage == "retry"]
        for timer in timers:
            assert driver.stage() == "retry"
            waits.append(timer.at - driver.now)
            driver.now = timer.at
            assert ev.SendRun(M0, Attempt("r", number + 1)) in driver.handle(ev.TimerFired(driver.now, timer.timer))
    (complete,) = completes(driver.says(ev.AttemptFailed, M0, Attempt("r", 4), "broken 4"))
    assert complete.error == "unavailable"
    assert "broken 4" in complete.message
    assert waits == pytest.approx([0.05, 0.1])  # the first retry goes out at once


def test_a_request_can_be_cancelled_while_it_backs_off() -> None:
    driver = Driver("m0")
    driver.arrive()
    driver.says(ev.AttemptFailed, M0, R1, "x")
    driver.says(ev.AttemptFailed, M0, R2, "x")
    assert driver.stage() == "retry"
    assert len(driver.cancel()) == 1
    assert driver.fire("stage", "r", 2, "retry") == []


def test_a_prefill_worker_that_missed_the_acknowledgement_fails_nobody() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.FirstToken, P0, R1)
    driver.says(ev.Adopted, D0, R1)
    assert driver.says(ev.AttemptFailed, P0, R1, "lease expired") == []
    assert driver.counters(P0) == (0, 0, 0)
    assert driver.says(ev.Finished, D0, R1) == [ev.Complete("r")]


def test_the_second_end_that_reports_the_same_failure_is_ignored() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.AttemptFailed, P0, R1, "push failed")
    assert driver.says(ev.AttemptFailed, D0, R1, "prefill worker gave it up") == []
    assert driver.lifecycle.snapshot()["r"].failures == 1


# ---- preemption --------------------------------------------------------------------------------------


def test_a_preempted_request_moves_to_another_decode_worker_and_this_is_no_failure() -> None:
    driver = Driver("p0", "d0", "d1")
    driver.decoding()
    assert without_timers(driver.says(ev.Preempted, D0, R1)) == [ev.SendReserve(D1, R2, P0), ev.SendPrefill(P0, R2, D1)]
    assert driver.lifecycle.snapshot()["r"].failures == 0


def test_preemptions_never_use_up_the_attempts() -> None:
    driver = Driver("m0", max_attempts=2)
    driver.arrive()
    for number in range(1, 20):
        assert completes(driver.says(ev.Preempted, M0, Attempt("r", number))) == []


# ---- stage deadlines -----------------------------------------------------------------------------------


def test_a_prefill_that_never_ends_is_retried_elsewhere() -> None:
    driver = Driver("p0", "p1", "d0", stage_floor=2.0, stage_factor=3.0)
    driver.report(P0, prefill_rate=16.0)
    timer = ev.Timer("stage", "r", 1, "prefill")
    assert driver.arrive()[-1] == ev.SetTimer(timer, 6.0)  # 3 x 32 tokens at 16 per second
    driver.now = 6.0
    actions = without_timers(driver.handle(ev.TimerFired(6.0, timer)))
    assert actions == [ev.SendAbort(D0, R1), ev.SendAbort(P0, R1), ev.SendReserve(D0, R2, P1), ev.SendPrefill(P1, R2, D0)]
    assert driver.lifecycle.snapshot()["r"].failures == 1


@pytest.mark.parametrize(
    "load",
    [{"prefill_rate": 0.0}, {"prefill_rate": 16.0, "num_waiting": 1}, {"prefill_rate": 16.0, "free_blocks": 1}],
    ids=["unknown rate", "queue", "no room"],
)
def test_a_prefill_that_waits_its_turn_is_not_retried(load: dict[str, float]) -> None:
    driver = Driver("p0", "d0")
    driver.report(P0, **load)
    driver.arrive()
    driver.now = 100.0
    (again,) = driver.fire("stage", "r", 1, "prefill")
    assert isinstance(again, ev.SetTimer)
    assert again.at > 100.0
    assert driver.lifecycle.snapshot()["r"].attempt == R1


def test_a_stage_is_prolonged_when_the_prediction_has_grown() -> None:
    driver = Driver("p0", "d0")
    driver.report(P0, prefill_rate=32.0)
    driver.arrive()
    driver.report(P0, prefill_rate=4.0)
    driver.now = 3.0
    assert driver.fire("stage", "r", 1, "prefill") == [ev.SetTimer(ev.Timer("stage", "r", 1, "prefill"), 24.0)]


def test_a_full_decode_pool_is_no_error_however_long_it_lasts() -> None:
    driver = Driver("p0", "d0")
    driver.report(P0, prefill_rate=1e6)
    driver.report(D0, free_blocks=0, num_waiting=5)
    driver.arrive()
    assert driver.says(ev.FirstToken, P0, R1) == []  # no stage deadline
    assert driver.stage() == "grant"
    driver.now = 500.0
    assert driver.fire("stage", "r", 1, "prefill") == []
    assert driver.says(ev.Granted, D0, R1, b"t") == [
        ev.SendGrant(P0, R1, b"t"),
        ev.SetTimer(ev.Timer("stage", "r", 1, "handover"), 502.0),
    ]


def test_a_cut_link_between_two_live_workers_is_noticed_and_avoided() -> None:
    driver = Driver("p0", "p1", "d0", "d1")
    driver.arrive()
    driver.says(ev.Granted, D0, R1, b"t")
    driver.says(ev.FirstToken, P0, R1)
    driver.now = 2.0
    actions = without_timers(driver.fire("stage", "r", 1, "handover"))
    assert actions == [ev.SendAbort(D0, R1), ev.SendAbort(P0, R1), ev.SendReserve(D1, R2, P1), ev.SendPrefill(P1, R2, D1)]


def test_a_late_handover_is_excused_a_few_times_while_the_link_works_for_others() -> None:
    driver = Driver("p0", "d0")
    driver.arrive()
    driver.says(ev.Granted, D0, R1, b"t")
    driver.says(ev.FirstToken, P0, R1)
    for excused in range(4):
        driver.now += 1.0
        driver.decoding(f"other{excused}")
        driver.now += 1.0
        driver.fire("stage", "r", 1, "handover")
        assert driver.lifecycle.snapshot()["r"].failures == (excused == 3)


def test_a_sequence_that_got_lost_while_decoding_is_resumed() -> None:
    driver = Driver("p0", "d0", "d1")
    driver.decoding()
    driver.report(D0, decode_step=0.1)
    driver.says(ev.Progress, D0, R1, 4)
    driver.now = 5.0
    assert driver.fire("stage", "r", 1, "decode") == [ev.SetTimer(ev.Timer("stage", "r", 1, "decode"), pytest.approx(8.6))]
    driver.report(D0, decode_step=0.1, num_running=1)
    driver.now = 9.0  # 12 more tokens should have taken 1.2 s, but it may share its worker with others
    driver.fire("stage", "r", 1, "decode")
    driver.report(D0, decode_step=0.1, num_running=0)
    driver.now = 13.0
    assert ev.SendReserve(D1, R2, P0) in driver.fire("stage", "r", 1, "decode")


def test_stage_timers_of_earlier_stages_and_attempts_are_ignored() -> None:
    driver = Driver("p0", "d0")
    driver.report(P0, prefill_rate=1e6)
    driver.decoding()
    driver.now = 100.0
    assert driver.fire("stage", "r", 1, "prefill") == []
    assert driver.fire("stage", "r", 1, "handover") == []
    assert driver.fire("stage", "r", 0, "decode") == []
    assert driver.fire("stage", "gone", 1, "decode") == []
