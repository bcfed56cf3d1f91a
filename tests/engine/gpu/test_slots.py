"""Places for attempts, and who loses one."""

from __future__ import annotations

from baton.core.request import Attempt
from baton.engine.gpu.slots import Slots


def named(text: str) -> list[Attempt]:
    return [Attempt(name, 1) for name in text]


def test_everybody_keeps_a_place_of_its_own_until_it_is_forgotten() -> None:
    slots = Slots(3)
    first = slots.take(named("abc"))
    assert sorted(first) == [0, 1, 2]
    assert slots.take(named("ca")) == [first[2], first[0]]
    slots.forget(Attempt("b", 1))
    slots.forget(Attempt("b", 1))
    assert slots.of(Attempt("b", 1)) is None
    assert slots.take(named("d")) == [first[1]]


def test_whoever_was_used_longest_ago_gives_way_but_none_of_those_at_hand() -> None:
    slots = Slots(3)
    slots.take(named("abc"))
    a, b = slots.take(named("ab"))
    d, a_again, b_again = slots.take(named("dab"))
    assert (a_again, b_again) == (a, b)
    assert d not in (a, b)
    assert slots.of(Attempt("c", 1)) is None
