"""Splitwise's measurements as step times: exact at the measured points, straight between them, refused when they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest
from baton.core.shape import StepShape
from baton.placement.splitwise import SplitwiseCost, read_splitwise
from hypothesis import given
from hypothesis import strategies as st

HEADER = (
    "model,hardware,prompt_size,batch_size,token_size,peak_power,average_power,prompt_time,token_time,e2e_time,tensor_parallel"
)
ROWS = (
    (128, 1, 40.0, 30.0),
    (512, 1, 60.0, 30.5),
    (512, 1, 62.0, 30.7),
    (512, 1, 90.0, 30.6),
    (512, 4, 200.0, 32.0),
    (2048, 1, 180.0, 31.0),
)
PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "splitwise" / "perf_model.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    lines = [f"m,a100,{prompt},{batch},128,1,1,{first},{token},1,8" for prompt, batch, first, token in ROWS]
    return _file(tmp_path, HEADER, *lines, "m,h100,128,1,128,1,1,1,1,1,8")


def prefill(tokens: int) -> StepShape:
    return StepShape(prefill_rows=1, prefill_tokens=tokens)


def test_measured_points_are_medians(table: Path) -> None:
    cost = read_splitwise(table, "m", "a100")
    assert cost.seconds(prefill(512)) == pytest.approx(0.062)
    assert cost.seconds(prefill(2048)) == pytest.approx(0.19)  # one prompt, or four of 512
    assert cost.decode_seconds(4, 4 * 512, 1) == pytest.approx(0.032)
    assert cost.decode_seconds(1, 512, 1) == pytest.approx(0.0306)


def test_lines_lie_between_them_and_go_on_beyond(table: Path) -> None:
    cost = read_splitwise(table, "m", "a100")
    assert cost.seconds(prefill(1)) == cost.seconds(prefill(128)) == pytest.approx(0.04)
    assert cost.seconds(prefill(1280)) == pytest.approx((0.062 + 0.19) / 2)
    assert cost.seconds(prefill(3584)) == pytest.approx(0.19 + (0.19 - 0.062))
    assert cost.decode_seconds(7, 7 * 512, 1) == pytest.approx(0.032 + 0.0014)


def test_context_costs_the_slope_of_a_lone_sequence(table: Path) -> None:
    cost = read_splitwise(table, "m", "a100")
    assert cost.context > 0
    assert cost.decode_seconds(1, 1512, 1) - cost.decode_seconds(1, 512, 1) == pytest.approx(1000 * cost.context)


def test_a_mixed_step_costs_the_sum(table: Path) -> None:
    cost = read_splitwise(table, "m", "a100")
    mixed = StepShape(prefill_rows=1, prefill_tokens=512, decode_rows=2, decode_context=900)
    assert cost.seconds(mixed) == pytest.approx(cost.seconds(prefill(512)) + cost.decode_seconds(2, 900, 1))


@given(st.integers(1, 90), st.integers(0, 5000), st.integers(1, 40))
def test_many_steps_cost_the_sum_of_single_ones(rows: int, more: int, steps: int) -> None:
    cost = SplitwiseCost(((128, 0.04), (512, 0.06)), ((1, 0.03), (64, 0.05)), 1e-7)
    context = rows + more
    singles = [StepShape(decode_rows=rows, decode_context=context + rows * number) for number in range(steps)]
    assert cost.decode_seconds(rows, context, steps) == pytest.approx(sum(cost.seconds(shape) for shape in singles))
    assert all(cost.seconds(shape) > 0 for shape in singles)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("model,hardware",), "line 1: the header lacks tensor_parallel"),
        ((HEADER, "m,a100,128,1,128,1,1,x,30,1,8"), "line 2: prompt_time is 'x'"),
        ((HEADER, "m,a100,128,1,128,1,1,40,-3,1,8"), "line 2: token_time is '-3'"),
        ((HEADER, "m,a100,128,1,128,1,1,40,30,1,4"), "holds nothing of m a100 8; it holds m a100 4"),
        ((HEADER, "m,a100,512,1,128,1,1,40,30,1,8"), "prefill: .* must be at least two"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_splitwise(_file(tmp_path, *lines), "m", "a100")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"none\.csv cannot be read"):
        read_splitwise(tmp_path / "none.csv", "m", "a100")


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published measurements are not beside this checkout (shared/data/splitwise)"
)
@pytest.mark.parametrize("model", ["llama2-70b", "bloom-176b"])
def test_an_h100_machine_is_faster_than_an_a100_one_above_all_at_prefill(model: str) -> None:
    a100, h100 = (read_splitwise(PUBLISHED, model, name) for name in ("a100-80gb", "h100-80gb"))
    assert 1.5 < a100.seconds(prefill(2048)) / h100.seconds(prefill(2048)) < 2.5
    assert 1.2 < a100.decode_seconds(32, 32 * 900, 1) / h100.decode_seconds(32, 32 * 900, 1) < 1.7


def _file(folder: Path, *lines: str) -> Path:
    file = folder / "perf_model.csv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
