"""The scheduler, one behaviour per test, on a device that checks every token and every slot it reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from baton.core.errors import InternalError, InvalidRequest
from baton.core.request import Attempt, FinishReason
from baton.core.step import ComputedEvent, RowOutput, StepOutput, StepPlan, TokenEvent
from baton.engine.blocks import BlockPool
from baton.engine.scheduler import Scheduler, SchedulerConfig
from baton.policy.ordering import ORDERING
from baton.tests.engine.fake_device import token_of
from baton.tests.engine.rig import Rig, rows

# ---- batching -----------------------------------------------------------------------------------


def test_a_sequence_runs_to_its_end_and_gives_its_blocks_back() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(10), max_tokens=5))
    assert (rig.scheduler.has_work, rig.scheduler.num_waiting, rig.scheduler.queued_tokens) == (True, 1, 10)
    events = rig.step()
    assert events == [TokenEvent(attempt, 0, (token_of("a", 0),))]
    assert (rig.scheduler.num_waiting, rig.scheduler.num_running, rig.scheduler.queued_tokens) == (0, 1, 0)
    rig.drain()
    rig.assert_finished(attempt)
    rig.assert_idle()
    assert rig.plan() is None


def test_prompts_are_cut_into_chunks_by_the_budget() -> None:
    rig = Rig(max_step_tokens=4)
    rig.add(rig.spec("a", range(10)))
    rig.add(rig.spec("b", range(3)))
    assert rows(rig.plan()) == [("a", 0, 4, False)]
    rig.commit()
    assert rig.scheduler.queued_tokens == 6 + 3
    assert rows(rig.plan()) == [("a", 4, 8, False)]
    rig.commit()
    assert rows(rig.plan()) == [("a", 8, 10, True), ("b", 0, 2, False)]


def test_decode_rows_come_before_prompts_and_share_a_step_with_them() -> None:
    rig = Rig(max_step_tokens=6)
    rig.add(rig.spec("a", range(2), max_tokens=9))
    rig.step()
    rig.add(rig.spec("b", range(9), priority=1))
    assert rows(rig.plan()) == [("a", 2, 3, True), ("b", 0, 5, False)]
    rig.commit()
    assert rows(rig.plan()) == [("a", 3, 4, True), ("b", 5, 9, True)]


def test_no_more_sequences_run_than_allowed() -> None:
    rig = Rig(max_num_seqs=2)
    attempts = [rig.add(rig.spec(name, range(3))) for name in "abc"]
    assert [row[0] for row in rows(rig.plan())] == ["a", "b"]
    rig.commit()
    rig.drain()
    for attempt in attempts:
        rig.assert_finished(attempt)


def test_a_sequence_that_sits_a_plan_out_keeps_its_seat() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add(rig.spec("a", range(3), max_tokens=1))
    rig.add(rig.spec("b", range(3), max_tokens=1))
    assert rows(rig.plan()) == [("a", 0, 3, True)]
    assert rig.plan() is None


def test_adopted_sequences_beyond_the_limit_take_turns_by_age() -> None:
    rig = Rig(max_num_seqs=2)
    specs = [rig.spec(name, (7, index, 7, 7, 7), max_tokens=3) for index, name in enumerate("abc")]
    for spec in specs:
        rig.adopt(spec, rig.land(spec))
    assert rows(rig.plan()) == [("a", 5, 6, True), ("b", 5, 6, True)]
    rig.commit()
    rig.drain()
    for spec in specs:
        rig.assert_finished(spec.attempt)
    rig.assert_idle()


def test_the_ordering_decides_who_starts() -> None:
    rig = Rig(max_num_seqs=1, ordering="shortest_prompt_first")
    rig.add(rig.spec("long", range(9), max_tokens=1))
    rig.add(rig.spec("short", range(2), max_tokens=1))
    assert rows(rig.plan()) == [("short", 0, 2, True)]


def test_equal_keys_start_in_the_order_in_which_they_came() -> None:
    rig = Rig(max_num_seqs=1)
    for name in "ba":
        rig.add(replace(rig.spec(name, range(2), max_tokens=1), arrival=0.0))
    assert rows(rig.plan()) == [("b", 0, 2, True)]


# ---- finishing ----------------------------------------------------------------------------------


def test_a_stop_token_ends_the_sequence_and_is_part_of_the_output() -> None:
    rig = Rig()
    stop = token_of("a", 2)
    first = next(index for index in range(9) if token_of("a", index) == stop)
    attempt = rig.add(rig.spec("a", range(3), max_tokens=9, stop=(stop,)))
    rig.drain()
    client = rig.clients[attempt]
    assert (client.finish, client.output[-1], len(client.output)) == (FinishReason.STOP, stop, first + 1)


def test_a_stop_token_before_min_tokens_is_a_token_like_any_other() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(3), max_tokens=6, stop=tuple(range(7)), min_tokens=4))
    rig.drain()
    assert (rig.clients[attempt].finish, len(rig.clients[attempt].output)) == (FinishReason.STOP, 4)


def test_the_models_limit_ends_a_sequence() -> None:
    rig = Rig(max_model_len=12)
    attempt = rig.add(rig.spec("a", range(9), max_tokens=50))
    rig.drain()
    assert (rig.clients[attempt].finish, len(rig.clients[attempt].output)) == (FinishReason.LENGTH, 3)
    rig.assert_idle()


def test_a_resumed_sequence_goes_on_with_the_next_token_and_counts_the_earlier_ones() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(6), max_tokens=5, output=3))
    plan = rig.plan()
    assert rows(plan) == [("a", 0, 9, True)]
    assert plan is not None
    assert plan.rows[0].output_index == 3
    assert rig.commit() == [TokenEvent(attempt, 3, (token_of("a", 3),))]
    rig.drain()
    rig.assert_finished(attempt)
    assert len(rig.clients[attempt].output) == 5


def test_several_tokens_for_one_row_are_taken_up_to_the_end_of_the_sequence() -> None:
    pool = BlockPool(16, 4)
    scheduler = Scheduler(pool, SchedulerConfig(64, 8, 100), ORDERING["fcfs"])
    rig = Rig()
    spec = rig.spec("a", range(6), max_tokens=7)
    scheduler.add(spec, 0.0)

    def run(tokens: tuple[int, ...]) -> tuple[StepPlan, list[object]]:
        plan = scheduler.plan(0.0)
        assert plan is not None
        return plan, [*scheduler.commit(plan, StepOutput(plan.step, (RowOutput(tokens),)), 0.0)]

    assert run((1, 2, 3))[1] == [TokenEvent(spec.attempt, 0, (1, 2, 3))]
    plan, events = run((4, 5))
    assert (plan.rows[0].start, plan.rows[0].tokens, plan.rows[0].output_index) == (6, (1, 2, 3), 3)
    assert events == [TokenEvent(spec.attempt, 3, (4, 5))]
    assert run((6, 7, 8))[1] == [TokenEvent(spec.attempt, 5, (6, 7), finish=FinishReason.LENGTH)]
    assert pool.num_free == 16


# ---- impossible requests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "max_tokens", "output", "field"),
    [(0, 4, 0, "prompt"), (20, 4, 0, "prompt"), (5, 3, 3, "max_tokens"), (17, 3, 0, "max_tokens")],
)
def test_a_sequence_that_can_never_run_is_refused(length: int, max_tokens: int, output: int, field: str) -> None:
    rig = Rig(num_blocks=4, max_model_len=20)
    with pytest.raises(InvalidRequest) as refused:
        rig.add(rig.spec("a", range(length), max_tokens, output))
    assert refused.value.field == field
    rig.assert_idle()


def test_the_last_sampled_token_needs_no_slot() -> None:
    rig = Rig(num_blocks=4)
    attempt = rig.add(rig.spec("a", range(10), max_tokens=7))
    rig.drain()
    rig.assert_finished(attempt)


def test_an_attempt_is_taken_once() -> None:
    rig = Rig()
    spec = rig.spec("a", range(3))
    rig.add(spec)
    with pytest.raises(InternalError, match="a#1 is here already"):
        rig.add(spec)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(InternalError, match="at least 1"):
        Rig(max_step_tokens=0)


# ---- prefix cache -------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(11), max_tokens=1))
    rig.drain()
    attempt = rig.add(rig.spec("b", [*range(11), 5], max_tokens=2))
    assert rows(rig.plan()) == [("b", 8, 12, True)]
    info = rig.scheduler.info(attempt)
    assert info is not None
    assert (info.cached_tokens, info.first_scheduled) == (8, rig.now)
    rig.commit()
    rig.drain()
    rig.assert_idle()


def test_at_least_one_token_is_computed() -> None:
    rig = Rig()
    for name in "ab":
        rig.add(rig.spec(name, range(8), max_tokens=1))
        plan = rig.plan()
        rig.commit()
    assert rows(plan) == [("b", 4, 8, True)]


def test_blocks_are_shared_as_soon_as_they_are_computed_and_not_before() -> None:
    rig = Rig(max_step_tokens=8)
    rig.add(rig.spec("a", range(12), max_tokens=4))
    early = rig.add(rig.spec("b", [*range(8), 9, 9, 9, 9], max_tokens=4))
    rig.plan()
    second = rig.plan()  # ahead: the first chunk of `a` is not committed, so `b` computes its own
    assert rows(second) == [("a", 8, 12, True), ("b", 0, 4, False)]
    rig.commit()
    rig.abort(early)
    rig.add(rig.spec("c", [*range(8), 8], max_tokens=1))
    assert ("c", 8, 9, True) in rows(rig.plan())


def test_output_is_part_of_the_prefix() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(6), max_tokens=6))
    rig.drain()
    rig.add(rig.spec("a2", [*range(6), *(token_of("a", index) for index in range(6)), 1]))
    assert rows(rig.plan()) == [("a2", 8, 13, True)]  # 11 of its tokens were fed: two full blocks


def test_prefix_cache_can_be_switched_off() -> None:
    rig = Rig(prefix_cache=False)
    for name in "ab":
        rig.add(rig.spec(name, range(9), max_tokens=1))
        plan = rig.plan()
        rig.commit()
    assert rows(plan) == [("b", 0, 9, True)]


# ---- adopting and handing over ------------------------------------------------------------------


def test_an_adopted_sequence_goes_on_after_its_first_token() -> None:
    rig = Rig()
    spec = rig.spec("a", range(9), max_tokens=4, output=1)
    attempt = rig.adopt(spec, rig.land(spec, head_room=1))
    plan = rig.plan()
    assert rows(plan) == [("a", 10, 11, True)]
    assert plan is not None
    assert (plan.rows[0].tokens, plan.rows[0].output_index) == ((token_of("a", 1),), 2)
    assert rig.commit() == [TokenEvent(attempt, 2, (token_of("a", 2),))]
    rig.drain()
    rig.assert_finished(attempt)
    rig.assert_idle()


def test_landed_blocks_are_prefix_hits_for_others() -> None:
    rig = Rig()
    spec = rig.spec("a", range(9))
    rig.adopt(spec, rig.land(spec))
    rig.add(rig.spec("b", [*range(8), 1]))
    assert ("b", 8, 9, True) in rows(rig.plan())


def test_a_refused_adoption_leaves_the_blocks_with_the_caller() -> None:
    rig = Rig()
    spec = rig.spec("a", range(9), max_tokens=1)
    blocks = rig.land(spec)
    with pytest.raises(InvalidRequest, match="nothing is left to sample"):
        rig.adopt(spec, blocks)
    with pytest.raises(InternalError, match="2 blocks for 9 tokens"):
        rig.adopt(rig.spec("b", range(9)), blocks[:2])
    rig.pool.release(blocks)
    rig.assert_idle()


def test_a_hand_over_reports_every_chunk_and_is_held_until_released() -> None:
    rig = Rig(max_step_tokens=4)
    attempt = rig.add(rig.spec("a", range(10), hand_over=True))
    first, second = rig.step(), rig.step()
    assert isinstance(first[0], ComputedEvent)
    assert (len(first), first[0].num_tokens, len(first[0].blocks), first[0].last) == (1, 4, 1, False)
    assert isinstance(second[0], ComputedEvent)
    assert (second[0].num_tokens, second[0].blocks[0]) == (8, first[0].blocks[0])
    last = rig.step()
    assert isinstance(last[0], ComputedEvent)
    assert (last[0].num_tokens, len(last[0].blocks), last[0].last) == (10, 3, True)
    assert last[1:] == [TokenEvent(attempt, 0, (token_of("a", 0),))]
    assert rig.step() == []
    assert (rig.scheduler.num_held, rig.scheduler.num_running, rig.scheduler.has_work) == (1, 0, False)
    assert rig.pool.num_free == 64 - 3
    rig.release(attempt)
    rig.scheduler.release(attempt)  # harmless
    rig.assert_idle()


def test_a_hand_over_that_ends_with_its_first_token_is_not_held() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(5), max_tokens=1, hand_over=True))
    assert rig.step() == [TokenEvent(attempt, 0, (token_of("a", 0),), finish=FinishReason.LENGTH)]
    rig.assert_idle()


def test_a_hand_over_is_given_up_by_release_before_it_is_held() -> None:
    rig = Rig(max_step_tokens=4)
    attempt = rig.add(rig.spec("a", range(10), hand_over=True))
    rig.plan()
    rig.release(attempt)
    assert rig.pool.num_free < 64, "a plan in flight still writes to its blocks"
    assert rig.commit() == []
    rig.assert_idle()


def test_only_a_hand_over_is_released() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(10)))
    with pytest.raises(InternalError, match="never to be handed over"):
        rig.scheduler.release(attempt)


def test_pushed_blocks_outlive_an_aborted_hand_over() -> None:
    rig = Rig(num_blocks=4)
    attempt = rig.add(rig.spec("a", range(10), hand_over=True))
    event = rig.step()[0]
    assert isinstance(event, ComputedEvent)
    rig.pool.retain(event.blocks)
    rig.abort(attempt)
    other = rig.add(rig.spec("b", [6] * 10, max_tokens=1))
    assert rig.plan() is None, "no block is free while the push runs"
    rig.device.check_holds("a", event.blocks, 10)
    rig.pool.release(event.blocks)
    rig.drain()
    rig.assert_finished(other)
    rig.assert_idle()


# ---- aborting and failing ------------------------------------------------------------------------


def test_abort_in_every_phase() -> None:
    rig = Rig(max_num_seqs=3, max_step_tokens=20)
    running, held, flying = (
        rig.add(rig.spec("running", range(4), max_tokens=9)),
        rig.add(rig.spec("held", [5] * 4, hand_over=True)),
        rig.add(rig.spec("flying", [6] * 4, max_tokens=9)),
    )
    rig.step()
    waiting = rig.add(rig.spec("waiting", range(50)))
    rig.step()
    rig.plan()
    for attempt in (running, held, flying, waiting):
        assert rig.abort(attempt)
        assert not rig.abort(attempt)
        assert rig.scheduler.info(attempt) is None
    assert rig.pool.num_free < 64
    assert rig.commit() == []
    rig.assert_idle()


def test_blocks_go_only_after_the_last_plan_that_uses_them() -> None:
    rig = Rig(max_in_flight=3)
    attempt = rig.add(rig.spec("a", range(5), max_tokens=9))
    for _ in range(3):
        rig.plan()
    rig.abort(attempt)
    for _ in range(2):
        rig.commit()
        assert rig.pool.num_free < 64
    rig.commit()
    rig.assert_idle()


def test_a_failed_step_gives_up_its_sequences_and_their_rows_in_later_plans() -> None:
    rig = Rig(max_step_tokens=9)
    lost = rig.add(rig.spec("a", range(5), max_tokens=5))
    rig.plan()
    rig.add(rig.spec("b", [6] * 5, max_tokens=5))
    assert [row[0] for row in rows(rig.plan())] == ["a", "b"]
    assert rig.fail() == [lost]
    assert rig.pool.num_free < 64 - 2
    assert [event.attempt for event in rig.commit()] == [Attempt("b", 1)]
    rig.drain()
    rig.assert_finished(Attempt("b", 1))
    rig.assert_idle()


def test_what_a_failed_step_computed_is_no_prefix() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(9)))
    rig.plan()
    rig.fail()
    rig.add(rig.spec("b", range(9)))
    assert rows(rig.plan()) == [("b", 0, 9, True)]


# ---- plan ahead ---------------------------------------------------------------------------------


def test_decode_rows_are_planned_before_their_token_is_known() -> None:
    rig = Rig(max_in_flight=3)
    attempt = rig.add(rig.spec("a", range(5), max_tokens=9))
    rig.plan()
    second, third = rig.plan(), rig.plan()
    assert second is not None
    assert third is not None
    assert [(row.start, row.tokens, row.pending, row.output_index) for row in (second.rows[0], third.rows[0])] == [
        (5, (), True, 1),
        (6, (), True, 2),
    ]
    assert rig.plan() is None, "three plans are uncommitted"
    rig.commit()
    assert rig.plan() is not None
    rig.drain()
    rig.assert_finished(attempt)


def test_a_pending_row_follows_its_sampling_row_at_once_or_waits_for_the_commit() -> None:
    rig = Rig(max_in_flight=3, max_num_seqs=1, max_step_tokens=4)
    spec = rig.spec("young", range(4), max_tokens=9)
    rig.adopt(spec, rig.land(spec))
    rig.plan()
    older = replace(rig.spec("old", [5] * 4, max_tokens=9), arrival=-1.0)
    rig.adopt(older, rig.land(older))
    assert [row[0] for row in rows(rig.plan())] == ["old"]
    rig.abort(older.attempt)
    assert rig.plan() is None, "the plan just before did not sample for `young`"
    rig.commit()
    assert rows(rig.plan()) == [("young", 5, 6, True)]


def test_nothing_is_planned_beyond_the_length_limit() -> None:
    rig = Rig(max_in_flight=3)
    attempt = rig.add(rig.spec("a", range(5), max_tokens=2))
    assert rig.plan() is not None
    assert rig.plan() is not None
    assert rig.plan() is None, "the second token is the last one"
    rig.commit()
    rig.commit()
    rig.assert_finished(attempt)


def test_a_row_planned_after_an_unforeseen_stop_is_discarded() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(5), max_tokens=9, stop=(token_of("a", 0),)))
    rig.plan()
    assert rows(rig.plan()) == [("a", 5, 6, True)]
    assert [event.attempt for event in rig.commit()] == [attempt]
    assert rig.pool.num_free == 64 - 2
    assert rig.commit() == []
    rig.assert_idle()


def test_chunks_of_one_prompt_may_be_in_flight_together() -> None:
    rig = Rig(max_in_flight=3, max_step_tokens=4)
    rig.add(rig.spec("a", range(7)))
    assert [rows(rig.plan())[0] for _ in range(3)] == [("a", 0, 4, False), ("a", 4, 7, True), ("a", 7, 8, True)]


def test_a_hand_over_is_not_planned_beyond_its_first_token() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5), hand_over=True))
    assert rig.plan() is not None
    assert rig.plan() is None


# ---- contracts with the executor ----------------------------------------------------------------


def test_plans_commit_in_order() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5)))
    first, second = rig.plan(), rig.plan()
    assert first is not None
    assert second is not None
    with pytest.raises(InternalError, match="plan 2 cannot be committed now: the oldest uncommitted plan is 1"):
        rig.scheduler.commit(second, StepOutput(2, (RowOutput((1,)),)), 0.0)


@pytest.mark.parametrize(
    "output",
    [
        StepOutput(2, (RowOutput((1,)),)),
        StepOutput(1, ()),
        StepOutput(1, (RowOutput(),)),
    ],
)
def test_an_output_that_does_not_answer_the_plan_is_refused(output: StepOutput) -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5)))
    plan = rig.plan()
    assert plan is not None
    with pytest.raises(InternalError, match=r"cannot answer plan 1|at least one token expected"):
        rig.scheduler.commit(plan, output, 0.0)


def test_a_row_that_is_discarded_needs_no_output() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(5)))
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    rig.abort(attempt)
    assert rig.scheduler.commit(plan, StepOutput(1, (RowOutput(),)), 0.0) == []
    rig.assert_idle()


def test_info_outlives_the_end_of_a_sequence_by_one_commit() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(5), max_tokens=1))
    added = rig.now
    rig.step()
    info = rig.scheduler.info(attempt)
    assert info is not None
    assert (info.num_computed, info.added, info.first_scheduled) == (5, added, added + 1.0)
    rig.add(rig.spec("b", range(5)))
    rig.step()
    assert rig.scheduler.info(attempt) is None
