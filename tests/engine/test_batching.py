"""Ways of batching for comparisons with other engines: phases apart, turns under a limit to the context, eager pipelines."""

from __future__ import annotations

from baton.core.step import StepPlan
from baton.tests.engine.rig import Rig


def rows(plan: StepPlan | None) -> list[str]:
    assert plan is not None
    return [row.attempt.request_id for row in plan.rows]


def adopt(rig: Rig, *names: str) -> None:
    for name in names:
        spec = rig.spec(name, range(5), max_tokens=12)
        rig.adopt(spec, rig.land(spec))


def test_with_phases_apart_prompts_go_first_and_alone() -> None:
    rig = Rig(phases_apart=True)
    adopt(rig, "a")
    rig.add(rig.spec("b", range(6)))
    rig.add(rig.spec("c", range(6)))
    assert rows(rig.plan()) == ["b", "c"]
    rig.commit()
    assert rows(rig.plan()) == ["a", "b", "c"]
    rig.commit()
    rig.add(rig.spec("d", range(6)))
    assert rows(rig.plan()) == ["d"]
    rig.drain()
    rig.assert_idle()


def test_with_phases_apart_the_rest_of_a_prompt_precedes_every_decode() -> None:
    rig = Rig(phases_apart=True, max_step_tokens=4)
    adopt(rig, "a")
    rig.add(rig.spec("b", range(20, 30)))
    plans = []
    for _ in range(4):
        plans.append(rows(rig.plan()))
        rig.commit()
    assert plans == [["b"], ["b"], ["b"], ["a", "b"]]


def test_with_phases_apart_those_that_decode_go_on_while_no_prompt_fits() -> None:
    rig = Rig(num_blocks=4, block_size=4, phases_apart=True)
    adopt(rig, "a")
    late = rig.add(rig.spec("late", range(20, 32), max_tokens=2))
    assert rows(rig.plan()) == ["a"]
    rig.drain()
    rig.assert_finished(late)
    rig.assert_idle()


def test_who_does_not_fit_into_the_context_of_a_step_is_first_in_the_next() -> None:
    rig = Rig(max_context=14)  # two sequences of six or seven tokens
    adopt(rig, "a", "b", "c")
    turns = []
    for _ in range(3):
        turns.append(rows(rig.plan()))
        rig.commit()
    assert turns == [["a", "b"], ["c", "a"], ["b", "c"]]
    rig.drain()
    rig.assert_idle()


def test_who_comes_while_a_step_runs_has_its_turn_after_those_that_wait() -> None:
    rig = Rig(max_context=14)
    adopt(rig, "a", "b", "c")
    assert rows(rig.plan()) == ["a", "b"]
    adopt(rig, "new")
    rig.commit()
    assert rows(rig.plan()) == ["c", "new"]
    rig.drain()
    rig.assert_idle()


def test_a_sequence_longer_than_the_context_of_a_step_runs_alone() -> None:
    rig = Rig(max_context=3)
    adopt(rig, "a", "b")
    assert rows(rig.plan()) == ["a"]
    rig.commit()
    assert rows(rig.plan()) == ["b"]
    rig.drain()
    rig.assert_idle()


def test_who_waits_for_a_turn_goes_before_those_that_had_one() -> None:
    rig = Rig(max_context=14)
    adopt(rig, "a", "b", "c")
    rig.plan()
    rig.abort(next(iter(rig.clients)))
    rig.commit()
    assert rows(rig.plan()) == ["c", "b"]


def test_an_eager_pipeline_takes_all_that_is_ready_and_any_number_of_steps() -> None:
    rig = Rig(pipeline_stages=2, eager_pipeline=True)
    plans = []
    for name in ("a", "b", "c"):
        adopt(rig, name, f"{name}2")
        plans.append(rows(rig.plan()))
    assert plans == [["a", "a2"], ["b", "b2"], ["c", "c2"]]
    assert rig.plan() is None
    rig.drain()
    rig.assert_idle()
