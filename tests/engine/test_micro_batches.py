"""Plans of a pipeline: micro-batches that share the sequences out and never wait for each other's tokens."""

from __future__ import annotations

import pytest
from baton.core.errors import InternalError
from baton.core.step import StepPlan
from baton.tests.engine.rig import Rig


def rows(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    assert not any(row.pending for row in plan.rows)
    return [row.attempt.request_id for row in plan.rows]


def adopt(rig: Rig, *names: str) -> None:
    for name in names:
        spec = rig.spec(name, range(5), max_tokens=12)
        rig.adopt(spec, rig.land(spec))


def test_micro_batches_take_equal_shares_and_come_back_in_turn() -> None:
    rig = Rig(pipeline_stages=2)
    adopt(rig, "a", "b", "c", "d", "e")
    assert rows(rig.plan()) == ["a", "b", "c"]
    assert rows(rig.plan()) == ["d", "e"]
    assert rig.plan() is None  # as many as there are stages
    rig.commit()
    assert rows(rig.plan()) == ["a", "b", "c"]
    rig.commit()
    assert rows(rig.plan()) == ["d", "e"]
    rig.drain()
    rig.assert_idle()


def test_shares_even_out_when_sequences_leave() -> None:
    rig = Rig(pipeline_stages=2)
    adopt(rig, "a", "b", "c", "d")
    rig.plan(), rig.plan()
    rig.abort(rig.in_flight[1].rows[0].attempt)
    rig.abort(rig.in_flight[1].rows[1].attempt)
    rig.commit()
    assert rows(rig.plan()) == ["a"]
    rig.commit()
    assert rows(rig.plan()) == ["b"]


def test_a_single_stage_plans_ahead_as_ever() -> None:
    rig = Rig(pipeline_stages=1)
    adopt(rig, "a")
    rig.plan()
    ahead = rig.plan()
    assert ahead is not None
    assert ahead.rows[0].pending


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    rig = Rig(pipeline_stages=3, max_step_tokens=4)
    rig.add(rig.spec("a", range(10)))
    starts = [plan.rows[0].start for plan in (rig.plan(), rig.plan(), rig.plan()) if plan is not None]
    assert starts == [0, 4, 8]
    assert rig.plan() is None
    rig.drain()
    rig.assert_idle()


def test_a_pipeline_has_at_least_one_stage() -> None:
    with pytest.raises(InternalError, match="at least 1"):
        Rig(pipeline_stages=0)
