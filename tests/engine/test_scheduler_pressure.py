"""The scheduler when blocks are short: who waits, who is preempted, and what becomes of them."""

from __future__ import annotations

import pytest
from baton.core.request import Attempt
from baton.core.step import PreemptedEvent, TokenEvent
from baton.tests.engine.fake_device import token_of
from baton.tests.engine.rig import Rig, rows


def test_the_head_of_the_queue_waits_for_its_blocks_and_nobody_overtakes_it() -> None:
    rig = Rig(num_blocks=4)
    first = rig.add(rig.spec("a", range(9), max_tokens=3))
    rig.step()
    head = rig.add(rig.spec("head", [6] * 9, max_tokens=1))
    rig.add(rig.spec("small", [5], max_tokens=1))
    assert [row[0] for row in rows(rig.plan())] == ["a"]
    rig.commit()
    rig.step()
    rig.assert_finished(first)
    assert [row[0] for row in rows(rig.plan())] == ["head", "small"]
    rig.commit()
    rig.assert_finished(head)


@pytest.mark.parametrize("how", ["shorter", "more urgent"])
def test_sequences_to_be_handed_over_leave_room_for_those_they_overtake(how: str) -> None:
    """A decode worker grants in order of arrival: what overtakes keeps its blocks until the overtaken one has been served."""
    rig = Rig(num_blocks=10, max_num_seqs=1, ordering="shortest_prompt_first" if how == "shorter" else "fcfs")
    rig.add(rig.spec("first", range(9), hand_over=True))  # 3 blocks
    rig.step()
    long = rig.add(rig.spec("long", [6] * 20, hand_over=True))  # 5 blocks
    for index in range(4):  # one block each; only two fit beside "first" and room for "long"
        rig.add(rig.spec(f"short-{index}", [index], hand_over=True, priority=how == "more urgent"))
    for _ in range(5):
        rig.step()
    assert rig.clients[long].computed is not None
    assert sorted(c.spec.attempt.request_id for c in rig.clients.values() if c.computed) == [
        "first",
        "long",
        "short-0",
        "short-1",
    ]
    rig.release(long)
    rig.drain()
    assert all(client.computed is not None for client in rig.clients.values())


def test_an_overtaken_sequence_starts_when_the_head_would_not_leave_it_room() -> None:
    rig = Rig(num_blocks=4, max_num_seqs=1, ordering="shortest_prompt_first")
    rig.add(rig.spec("long", range(13), hand_over=True))
    rig.add(rig.spec("short", [6], hand_over=True))
    assert [row[0] for row in rows(rig.plan())] == ["long"]


def test_starting_sequences_leave_the_watermark_to_running_ones() -> None:
    rig = Rig(num_blocks=10, watermark=0.2)
    rig.add(rig.spec("a", range(20), max_tokens=12))  # 5 blocks
    rig.step()
    rig.add(rig.spec("b", [6] * 16, max_tokens=1))  # 4 blocks: 1 would be left, 2 must be
    assert [row[0] for row in rows(rig.plan())] == ["a"]


def test_the_watermark_does_not_keep_a_lone_sequence_out() -> None:
    rig = Rig(num_blocks=10, watermark=0.5)
    attempt = rig.add(rig.spec("a", range(36), max_tokens=5))
    rig.drain()
    rig.assert_finished(attempt)


def tight(**config: object) -> tuple[Rig, Attempt, Attempt]:
    """Two sequences that fill a pool of four blocks; the next step needs a fifth."""
    rig = Rig(num_blocks=4, **config)  # type: ignore[arg-type]
    old = rig.add(rig.spec("old", range(7), max_tokens=6))
    young = rig.add(rig.spec("young", [6] * 7, max_tokens=6))
    rig.step()
    rig.step()
    assert rig.pool.num_free == 0
    return rig, old, young


def test_the_youngest_is_preempted_and_computed_again() -> None:
    rig, old, young = tight()
    assert [row[0] for row in rows(rig.plan())] == ["old"]
    assert (rig.scheduler.num_waiting, rig.scheduler.queued_tokens) == (1, 7 + 2)
    rig.commit()
    rig.drain()
    rig.assert_finished(old)
    rig.assert_finished(young)
    rig.assert_idle()


def test_low_priority_is_preempted_before_youth() -> None:
    rig = Rig(num_blocks=4)
    rig.add(rig.spec("old", range(7), max_tokens=6))
    rig.add(rig.spec("young", [6] * 7, max_tokens=6, priority=1))
    rig.step()
    rig.step()
    assert [row[0] for row in rows(rig.plan())] == ["young"]


def test_a_decode_worker_returns_preempted_sequences() -> None:
    rig, _old, young = tight(return_preempted=True)
    rig.now += 1.0
    plan = rig.scheduler.plan(rig.now)
    assert [row[0] for row in rows(plan)] == ["old"]
    assert rig.scheduler.take_events() == [PreemptedEvent(young)]
    assert rig.scheduler.take_events() == []
    assert rig.scheduler.info(young) is None
    assert not rig.scheduler.abort(young)


def test_a_sequence_preempted_in_flight_keeps_its_token_and_its_blocks_until_the_commit() -> None:
    rig = Rig(num_blocks=4, return_preempted=True)
    old = rig.add(rig.spec("old", range(8), max_tokens=6))
    young = rig.add(rig.spec("young", [6] * 7, max_tokens=6))
    rig.plan()
    assert rig.plan() is None, "`old` needs a block, and `young` gives up its own when its row has committed"
    assert rig.preempted == []
    assert rig.scheduler.num_running == 2
    events = rig.commit()
    assert [type(event) for event in events] == [TokenEvent, TokenEvent, PreemptedEvent]
    assert events[1:] == [TokenEvent(young, 0, (token_of("young", 0),)), PreemptedEvent(young)]
    assert [row[0] for row in rows(rig.plan())] == ["old"]
    rig.commit()
    rig.drain()
    rig.assert_finished(old)
    rig.assert_idle()


def test_a_sequence_aborted_after_its_preemption_in_flight_gives_its_blocks_once() -> None:
    rig = Rig(num_blocks=4)
    old = rig.add(rig.spec("old", range(8), max_tokens=6))
    young = rig.add(rig.spec("young", [6] * 7, max_tokens=6))
    rig.plan()
    assert rig.plan() is None
    rig.abort(young)
    rig.scheduler.check()
    rig.commit()
    rig.drain()
    rig.assert_finished(old)
    rig.assert_idle()


def test_one_preemption_at_a_time_while_blocks_are_on_their_way() -> None:
    rig = Rig(num_blocks=6)
    for name, token in (("a", 4), ("b", 5), ("c", 6)):
        rig.add(rig.spec(name, [token] * 8, max_tokens=6))
    rig.plan()
    assert rig.plan() is None
    assert len(rig.commit()) == 3
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)
    assert [row[0] for row in rows(rig.plan())] == ["a", "b"]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    rig, old, young = tight()
    rig.plan()
    rig.abort(old)
    rig.commit()
    assert rows(rig.plan()) == [("young", 4, 9, True)]
    rig.commit()
    info = rig.scheduler.info(young)
    assert info is not None
    assert info.cached_tokens == 0, "its own tokens were computed here"


def test_held_and_half_prefilled_hand_overs_are_never_preempted() -> None:
    rig = Rig(num_blocks=6, max_step_tokens=5)
    old = rig.add(rig.spec("old", [5], max_tokens=8))
    rig.step()
    held = rig.add(rig.spec("held", range(5), hand_over=True))
    rig.step()
    rig.step()
    assert rig.scheduler.num_held == 1
    begun = rig.add(rig.spec("begun", [6] * 9, hand_over=True))
    for _ in range(5):
        rig.step()
    assert rig.scheduler.num_held == 2
    assert rig.scheduler.num_waiting == 1, "`old` gave way, although it is the oldest"
    assert rig.step() == []
    rig.release(held)
    rig.release(begun)
    rig.drain()
    rig.assert_finished(old)
    rig.assert_idle()
