"""Measuring: which steps are run, and a whole profile of a tiny model on the real executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest, ModelError
from baton.core.shape import StepShape
from baton.engine.random_model import make_model
from baton.placement.links import measure_links
from baton.placement.measure import MeasureSpec, grid, measure
from baton.placement.model_shape import find_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(folder, "1M", max_model_len=1024)
    return folder


def spec(model: Path, **changed: object) -> MeasureSpec:
    return replace(MeasureSpec(str(model), kernels="cpu", kv_memory_bytes=32 << 20, seconds=0.5, rounds=2, quick=True), **changed)


def test_the_grid_has_all_kinds_of_steps_and_fits():
    for quick in (False, True):
        points = grid(MeasureSpec("m", quick=quick), longest=2048, num_blocks=1300)
        assert any(p.chunks and not p.contexts for p in points)
        assert any(p.contexts and not p.chunks for p in points)
        assert any(p.contexts and p.chunks for p in points)
        assert any(start > 0 for p in points for start, _ in p.chunks)
        assert {len(p.contexts) for p in points} >= {1, 8, 32}
        assert max(max(p.ends) for p in points) <= 2048
        assert max(p.num_tokens for p in points) <= 2048
        assert max(sum(-(-end // 32) for end in p.ends) for p in points) <= 1300
    assert len(grid(MeasureSpec("m"), 2048, 1300)) > 40


def test_the_grid_shrinks_with_the_budget_the_positions_and_the_pool():
    assert all(p.num_tokens <= 64 for p in grid(MeasureSpec("m", max_step_tokens=64), 2048, 1300))
    assert all(max(p.ends) <= 100 for p in grid(MeasureSpec("m"), 100, 1300))
    assert grid(MeasureSpec("m"), 1, 1300) == []


def test_a_model_is_measured_through_its_own_engine(model: Path):
    told: list[str] = []
    measured = measure(spec(model), lambda what, done, total: told.append(what))
    profile = measured.profile
    assert {"loading the model", "steps", "host overhead"} <= set(told)
    assert set(profile.costs[0].residuals) == {"prefill", "decode", "mixed"}
    assert {m.kind for m in measured.steps} == {"prefill", "decode", "mixed"}
    assert all(m.seconds > 0 for m in measured.steps)
    assert profile.host_overhead >= 0
    cost = profile.cost(find_model(str(model)))
    long, short = (StepShape(1, n, n * (n + 1) // 2, n, sampled=1) for n in (512, 32))
    assert cost.seconds(long) > cost.seconds(short)


def test_nothing_that_fits_is_refused(model: Path):
    folder = model.parent / "short"  # a model of so few positions that no step fits
    make_model(folder, "1M", max_model_len=2)
    with pytest.raises(InvalidRequest, match="nothing can be measured"):
        measure(spec(folder), lambda *_: None)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"config.json"):
        measure(spec(tmp_path), lambda *_: None)


def test_links_are_measured_between_two_processes():
    rates = measure_links(rounds=1)
    assert set(rates) == {"shm", "grpc", "torch_dist"}
    assert all(rate > 1e6 for rate in rates.values())
