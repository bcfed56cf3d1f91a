"""The orderings of the waiting queue."""

from __future__ import annotations

import pytest
from baton.policy.ordering import ORDERING, Waiting, fcfs, shortest_prompt_first

EARLY_LONG = Waiting(num_tokens=100, arrival=1.0)
LATE_SHORT = Waiting(num_tokens=10, arrival=2.0)
LATER_URGENT = Waiting(num_tokens=1000, arrival=3.0, priority=1)


def test_fcfs_goes_by_arrival() -> None:
    assert sorted([LATE_SHORT, EARLY_LONG], key=fcfs) == [EARLY_LONG, LATE_SHORT]


def test_shortest_prompt_first_goes_by_length_then_arrival() -> None:
    late_long = Waiting(num_tokens=100, arrival=4.0)
    assert sorted([late_long, EARLY_LONG, LATE_SHORT], key=shortest_prompt_first) == [LATE_SHORT, EARLY_LONG, late_long]


@pytest.mark.parametrize("name", sorted(ORDERING))
def test_higher_priority_goes_first_in_every_ordering(name: str) -> None:
    assert min([EARLY_LONG, LATE_SHORT, LATER_URGENT], key=ORDERING[name]) is LATER_URGENT


def test_the_table_names_the_orderings() -> None:
    assert dict(ORDERING) == {"fcfs": fcfs, "shortest_prompt_first": shortest_prompt_first}
