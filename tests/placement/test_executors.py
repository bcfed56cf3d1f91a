"""Answers come in the order of the questions, wherever they are worked out; errors come through."""

from __future__ import annotations

import math
import os

import pytest
from baton.core.errors import Unavailable
from baton.deploy.settings import prepare_ray_environment
from baton.placement.executors import RayCluster, executor


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_in_order(workers: int) -> None:
    with executor(workers) as runner:
        assert runner.map(math.factorial, [5, 3, 0, 7]) == [120, 6, 1, 5040]
        assert runner.map(math.factorial, []) == []
        with pytest.raises(ValueError):
            runner.map(math.sqrt, [4.0, -1.0])


@pytest.mark.cluster
def test_answers_in_order_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")  # a Ray of this test's own, whatever else runs here
    prepare_ray_environment()
    with executor(1, use_ray=True) as runner:
        assert runner.map(math.factorial, [5, 3, 0, 7]) == [120, 6, 1, 5040]
        assert isinstance(runner, RayCluster)
        assert runner.width == os.cpu_count()
        assert os.getpid() not in runner.map(_process, range(2))
        with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
            runner.map(math.sqrt, [4.0, -1.0])
    import ray

    assert not ray.is_initialized()


def _process(_: int) -> int:
    return os.getpid()


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(Unavailable, match="Ray is not installed"), executor(1, use_ray=True):
        pass
