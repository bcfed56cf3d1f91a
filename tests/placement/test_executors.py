"""Answers come in the order of the questions, wherever they are worked out; errors come through."""

from __future__ import annotations

import math

import pytest
from baton.core.errors import Unavailable
from baton.placement.executors import executor


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_in_order(workers: int) -> None:
    with executor(workers) as runner:
        assert runner.map(math.factorial, [5, 3, 0, 7]) == [120, 6, 1, 5040]
        assert runner.map(math.factorial, []) == []
        with pytest.raises(ValueError):
            runner.map(math.sqrt, [4.0, -1.0])


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(Unavailable, match="Ray is not installed"), executor(1, use_ray=True):
        pass
