"""The order in which virtual time passes."""

from __future__ import annotations

import math

import pytest
from baton.core.errors import InternalError
from baton.simulator.heap import EventHeap


def test_calls_come_in_order_of_time_and_of_insertion() -> None:
    heap, seen = EventHeap(), list[tuple[float, str]]()

    def note(name: str) -> None:
        seen.append((heap.now, name))
        if name == "b":
            heap.push(2.0, note, "last of its time")

    for at, name in ((2.0, "b"), (1.0, "a"), (2.0, "c"), (math.inf, "never")):
        heap.push(at, note, name)
    heap.run()
    assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "c"), (2.0, "last of its time")]
    assert heap.num_events == 4
    assert len(heap) == 0


def test_nothing_happens_in_the_past() -> None:
    heap = EventHeap()
    heap.push(1.0, lambda: None)
    heap.run()
    with pytest.raises(InternalError, match="backwards"):
        heap.push(0.5, lambda: None)
