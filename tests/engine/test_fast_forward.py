"""`Scheduler.repeatable` against single steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from baton.core.errors import InternalError
from baton.core.step import RowOutput, SequenceEvent, StepOutput, StepPlan, TokenEvent
from baton.engine.scheduler import Scheduler
from baton.tests.engine.fake_device import token_of
from baton.tests.engine.rig import Rig
from hypothesis import given, settings
from hypothesis import strategies as st


def shape(plan: StepPlan | None, ahead: int = 0) -> list[tuple[str, int, int, int]] | None:
    """Request, start, number of tokens and output index of every row, `ahead` steps later. The order of rows is free."""
    if plan is None:
        return None
    return sorted((row.attempt.request_id, row.start + ahead, row.num_tokens, row.output_index + ahead) for row in plan.rows)


def repeats(rig: Rig) -> int:
    plan = rig.plan()
    assert plan is not None
    return rig.scheduler.repeatable(plan)


def test_decode_recurs_until_the_first_sequence_ends_by_length() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5), max_tokens=20))
    rig.add(rig.spec("b", [6] * 5, max_tokens=9))
    rig.step()
    assert repeats(rig) == 8


def test_decode_recurs_until_the_pool_is_exhausted() -> None:
    rig = Rig(num_blocks=6)
    rig.add(rig.spec("a", range(5), max_tokens=15))
    rig.add(rig.spec("b", [6] * 5, max_tokens=15))
    rig.step()
    assert repeats(rig) == 7  # three blocks each hold 12 tokens, 5 are there


def test_a_prefill_chunk_does_not_recur() -> None:
    rig = Rig(max_step_tokens=1)
    rig.add(rig.spec("a", range(5)))
    assert repeats(rig) == 1


def test_a_hand_over_does_not_recur() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(1), hand_over=True, max_tokens=9))
    assert repeats(rig) == 1


def test_a_forecast_ends_where_a_waiting_sequence_may_find_a_new_prefix() -> None:
    rig = Rig(num_blocks=5)
    spec = rig.spec("a", range(5), max_tokens=6)
    rig.adopt(spec, rig.land(spec, head_room=1))
    shared = [*range(5), *(token_of("a", index) for index in range(3))]
    rig.add(rig.spec("head", [*shared, *[6] * 8], max_tokens=1))  # three blocks beyond the known one, two are free
    assert repeats(rig) == 3
    rig.commit()
    for _ in range(2):
        rig.step()
    plan = rig.plan()
    assert plan is not None
    assert [row.attempt.request_id for row in plan.rows] == ["a", "head"]


def test_news_since_the_plan_end_the_forecast() -> None:
    rig = Rig()
    attempt = rig.add(rig.spec("a", range(5), max_tokens=20))
    rig.step()
    plan = rig.plan()
    assert plan is not None
    assert rig.scheduler.repeatable(plan) == 19
    rig.add(rig.spec("b", range(5)))
    assert rig.scheduler.repeatable(plan) == 1
    rig.commit()
    plan = rig.plan()
    assert plan is not None
    rig.abort(attempt)
    assert rig.scheduler.repeatable(plan) == 1


def test_plans_made_ahead_and_committed_plans_are_not_forecast() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5), max_tokens=20))
    first = rig.plan()
    second = rig.plan()
    assert first is not None
    assert second is not None
    assert rig.scheduler.repeatable(first) == rig.scheduler.repeatable(second) == 1
    rig.commit()
    rig.commit()
    assert rig.scheduler.repeatable(second) == 1


PROMPTS = st.builds(
    lambda length, tail: tuple(range(length)) + tail,
    st.integers(0, 12),
    st.lists(st.integers(0, 2), min_size=1, max_size=2).map(tuple),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(PROMPTS, st.integers(1, 14), st.integers(0, 1), st.booleans(), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(6, 24),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from((0.0, 0.2)),
)
def test_a_plan_recurs_as_often_as_forecast(
    arrivals: list[tuple[tuple[int, ...], int, int, bool, int]],
    num_blocks: int,
    block_size: int,
    max_step_tokens: int,
    max_num_seqs: int,
    watermark: float,
) -> None:
    """Sequences arrive between forecasts; while a forecast lasts every plan must be the first one, further on."""
    rig = Rig(num_blocks, block_size, max_step_tokens=max_step_tokens, max_num_seqs=max_num_seqs, watermark=watermark)
    rest = [arrival for arrival in arrivals if rig.pool.num_blocks_for(len(arrival[0]) + arrival[1]) < num_blocks]
    forecast, ahead, steps = 0, 0, 0
    base = None
    while rest or rig.scheduler.has_work:
        steps += 1
        if ahead == forecast and rest and rest[0][4] <= steps:
            prompt, max_tokens, priority, landed, _ = rest.pop(0)
            spec = rig.spec(f"r{len(rest)}", prompt, max_tokens, priority=priority)
            if landed and max_tokens > 1 and rig.pool.num_free >= rig.pool.num_blocks_for(len(prompt)):
                rig.adopt(replace(spec, arrival=-rig.now), rig.land(spec))
            else:
                rig.add(spec)
        plan = rig.plan()
        if plan is None:
            assert ahead == forecast, "the forecast plan did not come"
            continue
        if ahead < forecast:
            assert shape(plan) == shape(base, ahead)
        else:
            base, forecast, ahead = plan, rig.scheduler.repeatable(plan), 0
            assert forecast >= 1
        ahead += 1
        rig.commit()
    assert ahead == forecast
    rig.assert_idle()


# ---- many steps at once ---------------------------------------------------------------------------------


TOKEN = 5  # what every step samples; prompts are made of other tokens, and of this one, so that prefixes may meet


def fill(rig: Rig, prompts: Sequence[tuple[int, int, int]]) -> None:
    """Adopt sequences of (tokens of the prompt, output tokens wanted, kind of the prompt), as long as there is room."""
    for index, (length, max_tokens, kind) in enumerate(prompts):
        spec = rig.spec(f"s{index}", (TOKEN if kind == 2 else kind,) * length, max_tokens=max_tokens)
        need = rig.pool.num_blocks_for(length) + 1
        if rig.pool.num_free >= need:
            rig.scheduler.adopt(spec, rig.pool.allocate(need) or (), TOKEN, rig.now)


def step(scheduler: Scheduler, plan: StepPlan, now: float) -> list[SequenceEvent]:
    return scheduler.commit(plan, StepOutput(plan.step, (RowOutput((TOKEN,)),) * len(plan.rows)), now)


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(2, 20), st.integers(1, 2)), min_size=1, max_size=6),
    num_blocks=st.integers(11, 40),
    prefix_cache=st.booleans(),
    share=st.floats(0, 1),
)
def test_many_steps_at_once_leave_what_single_steps_leave(
    prompts: list[tuple[int, int, int]], num_blocks: int, prefix_cache: bool, share: float
) -> None:
    many, single = (Rig(num_blocks, return_preempted=True, prefix_cache=prefix_cache) for _ in range(2))
    fill(many, prompts)
    fill(single, prompts)
    for _ in range(200):
        plan, one = many.scheduler.plan(0.0), single.scheduler.plan(0.0)
        assert plan == one
        assert many.scheduler.take_events() == single.scheduler.take_events()
        if plan is None or one is None:
            break
        repeats = many.scheduler.repeatable(plan)
        assert many.scheduler.recurs(plan)
        ahead = round(share * (repeats - 1))
        many.scheduler.advance(plan, ahead, TOKEN)
        for _ in range(ahead):
            assert not any(isinstance(event, TokenEvent) and event.finish for event in step(single.scheduler, one, 0.0))
            one = single.scheduler.plan(0.0)
            assert one is not None
        assert many.scheduler.repeatable(plan) == single.scheduler.repeatable(one)
        assert many.pool.snapshot() == single.pool.snapshot()
        many.scheduler.check()
        for row in plan.rows:
            assert many.scheduler.info(row.attempt) == single.scheduler.info(row.attempt)
            assert many.scheduler.num_output(row.attempt) == single.scheduler.num_output(row.attempt)
        left = [event for event in step(single.scheduler, one, 0.0) if single.scheduler.num_output(event.attempt) is None]
        assert many.scheduler.commit_decode(plan, TOKEN) == left
        assert many.pool.snapshot() == single.pool.snapshot()
    assert not many.scheduler.has_work


def test_an_advanced_plan_is_committed_like_any_other() -> None:
    rig = Rig()
    fill(rig, [(5, 20, 1)])
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    rig.scheduler.advance(plan, 3, TOKEN)
    (event,) = step(rig.scheduler, plan, 0.0)
    assert isinstance(event, TokenEvent)
    assert event.position == 4
    rig.scheduler.check()


def test_a_plan_with_prompts_cannot_be_advanced() -> None:
    rig = Rig()
    rig.add(rig.spec("a", range(5)))
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    assert not rig.scheduler.recurs(plan)
    with pytest.raises(InternalError, match="does not recur"):
        rig.scheduler.advance(plan, 1, TOKEN)
    with pytest.raises(InternalError, match="does not recur"):
        rig.scheduler.commit_decode(plan, TOKEN)


def test_a_plan_cannot_be_advanced_beyond_its_blocks() -> None:
    rig = Rig(num_blocks=8)
    fill(rig, [(5, 20, 1), (5, 20, 1)])
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    repeats = rig.scheduler.repeatable(plan)
    with pytest.raises(InternalError, match="cannot grow"):
        rig.scheduler.advance(plan, repeats, TOKEN)
