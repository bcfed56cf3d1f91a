"""DistServe's published step times: the formulas, and what is said of a file that does not hold them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest
from baton.core.shape import StepShape
from baton.placement.distserve import DistServeCost, read_distserve
from hypothesis import given
from hypothesis import strategies as st

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "distserve" / "profiler-a100-80g.distserve.json"
COST = DistServeCost((18e-3, 0.1e-3, 7e-9), (20e-3, 6e-7, 4e-5), (7e-3, 5e-7, 16e-5), threshold=95)


def prompts(*lengths: int) -> StepShape:
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    return StepShape(len(lengths), sum(lengths), pairs, sum(lengths), sampled=len(lengths))


def decode(rows: int, context: int) -> StepShape:
    return StepShape(decode_rows=rows, decode_context=context, sampled=rows)


def test_a_prefill_is_priced_over_lengths_and_their_squares():
    expected = 18e-3 + 0.1e-3 * 600 + 7e-9 * (100**2 + 500**2) + 1e-3 + 2e-3 + 1e-7 * 600
    assert COST.seconds(prompts(100, 500)) == pytest.approx(expected)


def test_a_decode_step_has_other_constants_from_the_threshold_on():
    # 94 rows of 200 tokens that feed one more each: the formula counts the fed token, the host's share does not.
    assert COST.seconds(decode(94, 94 * 201)) == pytest.approx(20e-3 + 6e-7 * 94 * 201 + 4e-5 * 94 + 2e-3 + 1e-7 * 94 * 200)
    assert COST.seconds(decode(95, 95 * 201)) == pytest.approx(7e-3 + 5e-7 * 95 * 201 + 16e-5 * 95 + 2e-3 + 1e-7 * 95 * 200)


def test_stages_share_the_work_and_prefill_pays_for_each():
    two = DistServeCost(COST.prefill, COST.small_decode, COST.large_decode, 95, stages=2, host=0.0, host_token=0.0)
    assert two.seconds(prompts(100)) == pytest.approx((18e-3 + 10e-3 + 7e-5) / 2 + 2e-3)
    assert two.seconds(decode(10, 1010)) == pytest.approx((20e-3 + 6e-7 * 1010 + 4e-4) / 2)


def test_a_mixed_step_is_a_prefill_and_then_a_decode_step():
    mixed = StepShape(1, 100, 5050, 100, 8, 808, 9)
    assert COST.seconds(mixed) == pytest.approx(COST.seconds(prompts(100)) + COST.seconds(decode(8, 808)))
    assert COST.seconds(StepShape()) > 0


@given(st.integers(1, 200), st.integers(1, 50_000), st.integers(0, 300), st.integers(1, 4))
def test_many_decode_steps_cost_the_sum_of_them(rows: int, context: int, steps: int, stages: int):
    cost = DistServeCost(COST.prefill, COST.small_decode, COST.large_decode, 95, stages)
    one_by_one = math.fsum(cost.seconds(decode(rows, context + i * rows)) for i in range(steps))
    assert cost.decode_seconds(rows, context, steps) == pytest.approx(one_by_one, rel=1e-12)


def write(tmp_path: Path, **changed: object) -> Path:
    degree = {
        "decoding_large_small_bs_threshold": 95,
        "prefill": [18, 0.1, 7e-6],
        "decoding_smallbs": [20, 6e-4, 0.04],
        "decoding_largebs": [7, 5e-4, 0.16],
    }
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"facebook/opt-13b": {"1": degree | changed}}))
    return file


def test_a_file_is_read_in_milliseconds(tmp_path: Path):
    read = read_distserve(write(tmp_path), "facebook/opt-13b", 1)
    assert (read.prefill, read.small_decode, read.large_decode) == tuple(
        pytest.approx(triple) for triple in (COST.prefill, COST.small_decode, COST.large_decode)
    )
    assert (read.threshold, read.stages) == (95, 1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prefill": [1, 2]}, "prefill is .1, 2.; it must be a list of three numbers"),
        ({"prefill": [1, 2, -3]}, "prefill is"),
        ({"decoding_smallbs": "fast"}, "decoding_smallbs is 'fast'"),
        ({"decoding_largebs": [1, True, 2]}, "decoding_largebs is"),
        ({"decoding_large_small_bs_threshold": 0}, "decoding_large_small_bs_threshold is 0; it must be a whole number"),
    ],
)
def test_a_wrong_number_is_refused_with_file_and_key(tmp_path: Path, changed: dict[str, object], message: str):
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_distserve(write(tmp_path, **changed), "facebook/opt-13b", 1)
    assert "profile.json" in str(refused.value)


def test_what_a_file_does_not_hold_is_refused(tmp_path: Path):
    file = write(tmp_path)
    with pytest.raises(InvalidRequest, match=r"no model 'opt'; it holds facebook/opt-13b"):
        read_distserve(file, "opt", 1)
    with pytest.raises(InvalidRequest, match=r"no tensor parallelism of facebook/opt-13b '8'; it holds 1"):
        read_distserve(file, "facebook/opt-13b", 8)
    with pytest.raises(InvalidRequest, match=r"pipeline_parallel is 0"):
        read_distserve(file, "facebook/opt-13b", 1, 0)
    file.write_text("[]")
    with pytest.raises(InvalidRequest, match=r"holds a JSON list"):
        read_distserve(file, "facebook/opt-13b", 1)
    file.write_text("{")
    with pytest.raises(InvalidRequest, match=r"is not JSON"):
        read_distserve(file, "facebook/opt-13b", 1)
    with pytest.raises(InvalidRequest, match=r"cannot be read"):
        read_distserve(tmp_path / "none.json", "facebook/opt-13b", 1)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published profile is not beside this checkout (shared/data/distserve)")
def test_the_published_file_gives_the_published_times():
    # Computed by hand from the file's OPT-13B, TP 2: 14.74 ms + 0.0686 ms a token + 2.45 ns a squared token, and 3.1 ms more.
    cost = read_distserve(PUBLISHED, "facebook/opt-13b", 2)
    assert cost.seconds(prompts(1000)) == pytest.approx(88.87e-3, abs=0.01e-3)
    assert read_distserve(PUBLISHED, "facebook/opt-66b", 4, 2).stages == 2
