"""A bounded sample of steps in which rare sizes stay beside common ones."""

from __future__ import annotations

from baton.core.request import Attempt, SamplingParams
from baton.core.step import StepPlan, StepRow
from baton.engine.step_log import MAX_CLASSES, PER_CLASS, STRIDE, StepLog


def row(number: int, start: int, fed: int, output_index: int) -> StepRow:
    return StepRow(Attempt(f"r{number}", 1), start, (1,) * fed, tuple(range(64)), SamplingParams(), output_index, True)


def decode(step: int, rows: int, context: int) -> StepPlan:
    return StepPlan(step, tuple(row(number, context - 1, 1, 5) for number in range(rows)))


def prefill(step: int, tokens: int) -> StepPlan:
    return StepPlan(step, (row(0, 0, tokens, 0),))


def test_common_steps_push_out_no_rare_one() -> None:
    log = StepLog()
    log.add(prefill(1, 300), 0.25, 0.26)
    for step in range(2, 2000):
        log.add(decode(step, 3, 100), 0.01 + step * 1e-6, 0.011)
    steps = log.steps()
    (rare,) = [step for step in steps if step.shape.prefill_rows]
    assert (rare.shape.prefill_tokens, rare.shape.prefill_pairs) == (300, 300 * 301 // 2)
    assert (rare.seconds, rare.period) == (0.25, 0.26)
    common = [step for step in steps if step.shape.decode_rows]
    assert len(common) == PER_CLASS
    assert min(step.seconds for step in common) > 0.01 + 1e-6 * (2000 - STRIDE * (PER_CLASS + 1))  # the latest
    assert {step.shape.decode_context for step in common} == {300}


def test_bounded_whatever_comes() -> None:
    log = StepLog()
    step = 0
    for rows in range(1, 40):
        for context in (2, 5, 9, 17, 33, 65, 130, 260, 520, 1040, 2080, 4160):
            for fed in (0, 3, 300):
                step += 1
                rest = decode(step, rows, context).rows
                log.add(StepPlan(step, (*rest, *(prefill(step, fed).rows if fed else ()))), 0.01, 0.01)
                log.add(StepPlan(step, (*rest, row(99, 0, 1 + step % 500, 0))), 0.01, 0.01)
    assert 200 < len(log.steps()) <= MAX_CLASSES * PER_CLASS
    assert all(each.period >= each.seconds for each in log.steps())
