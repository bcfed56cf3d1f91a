from __future__ import annotations

import pytest
from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepPlan, StepRow
from baton.engine.timing import FIRST_GUESS, StepTimes, is_decode_only


def plan(*num_tokens: int, output_index: int = 1) -> StepPlan:
    rows = tuple(
        StepRow(Attempt(f"r{i}", 0), 0, tuple(range(n)), (0,), SamplingParams(), output_index, True)
        for i, n in enumerate(num_tokens)
    )
    return StepPlan(1, rows)


def test_decode_and_prefill_steps_are_told_apart() -> None:
    assert is_decode_only(plan(1, 1))
    assert not is_decode_only(plan(1, 2))
    assert not is_decode_only(plan(1, output_index=0))  # a prompt of one token


def test_nothing_seen_means_a_generous_guess() -> None:
    times = StepTimes()
    assert times.predict(plan(1)) == times.predict(plan(100)) == FIRST_GUESS


def test_prefill_is_predicted_by_a_fixed_part_and_a_rate() -> None:
    times = StepTimes()
    times.observe(plan(1, 1), 0.01)
    times.observe(plan(100), 0.51)
    assert times.prefill_rate == pytest.approx(200.0)
    assert times.predict(plan(400)) == pytest.approx(2.01)
    assert times.predict(plan(1)) == pytest.approx(0.01)


def test_many_tiny_prompts_do_not_spoil_the_prediction_of_a_long_one() -> None:
    times = StepTimes()
    times.observe(plan(1), 0.01)
    times.observe(plan(1000), 0.51)
    for _ in range(100):
        times.observe(plan(8), 0.0142)  # the fixed part, and a little more than the tokens' share
    assert times.predict(plan(512)) == pytest.approx(0.266, rel=0.15)


def test_a_changed_rate_is_learnt_within_some_long_prompts() -> None:
    times = StepTimes()
    times.observe(plan(1000), 1.0)
    for _ in range(20):
        times.observe(plan(1000), 2.0)
    assert times.prefill_rate == pytest.approx(500.0, rel=0.02)


def test_averages_follow_what_changes() -> None:
    times = StepTimes()
    times.observe(plan(1), 0.01)
    for _ in range(50):
        times.observe(plan(1), 0.03)
    assert times.decode_step == pytest.approx(0.03, rel=0.01)


def test_a_step_without_a_time_teaches_nothing() -> None:
    times = StepTimes()
    times.observe(plan(10), 0.0)
    assert (times.prefill_rate, times.decode_step) == (0.0, 0.0)


def test_a_ramp_of_decode_steps_teaches_what_its_steps_teach_one_by_one() -> None:
    for first, last, steps, before in ((0.01, 0.03, 7, 0.02), (0.03, 0.01, 50, 0.0), (0.02, 0.02, 2, 0.0), (0.01, 0.02, 1, 0.05)):
        at_once, one_by_one = StepTimes(decode_step=before), StepTimes(decode_step=before)
        at_once.observe_decode(first, last, steps)
        for step in range(steps):
            seconds = last if steps == 1 else first + (last - first) * step / (steps - 1)
            one_by_one.observe_decode(seconds, seconds, 1)
        assert at_once.decode_step == pytest.approx(one_by_one.decode_step, rel=1e-12)
        assert at_once.last_step == pytest.approx(one_by_one.last_step)
