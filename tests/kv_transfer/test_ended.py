"""What both ends remember of attempts that are over: long enough, and no longer."""

from __future__ import annotations

import pytest
from baton.core.request import Attempt
from baton.kv_transfer import ended as ended_module
from baton.kv_transfer.ended import LEASES_REMEMBERED, Ended

A, B = Attempt("a", 1), Attempt("b", 1)


def test_an_attempt_is_forgotten_when_nothing_of_it_can_be_under_way() -> None:
    ended = Ended(lease=2.0)
    ended.add(A)
    ended.now = 5.0
    ended.add(B)
    ended.now = LEASES_REMEMBERED * 2.0 - 0.1
    ended.forget_old()
    assert A in ended
    ended.now = LEASES_REMEMBERED * 2.0
    ended.forget_old()
    assert A not in ended
    assert B in ended


def test_an_attempt_that_ends_again_is_remembered_anew() -> None:
    ended = Ended(lease=1.0)
    ended.add(A)
    ended.now = 10.0
    ended.add(A)
    ended.now = float(LEASES_REMEMBERED)
    ended.forget_old()
    assert A in ended


def test_the_number_of_remembered_attempts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_module, "NUM_REMEMBERED", 10)
    ended = Ended(lease=1.0)
    for number in range(100):
        ended.add(Attempt(f"r{number}", 1))
    assert len(ended) == 10
    assert Attempt("r99", 1) in ended
    assert Attempt("r89", 1) not in ended
