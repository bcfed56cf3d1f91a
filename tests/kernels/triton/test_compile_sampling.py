"""The sampling kernels become machine code of an H100, for every type of logits and for small and large vocabularies."""

from __future__ import annotations

import pytest
from baton.tests.kernels.triton.sm90 import Case, Compiled, compile_cases

pytest.importorskip("triton")

from baton.kernels.triton.sampling import DRAW_TILE
from baton.kernels.triton.slices import SLICE
from baton.kernels.triton.truncation import COUNT_TILE, MAX_HELD, NUM_FIRST_PIVOTS, NUM_PIVOTS, SEARCH_TILE


def cases(logits: str, padded_slices: int) -> list[Case]:
    sizes = ["i32:16", "i32:16", "i32:16", "i32"]
    counted, searched = ["*fp32", "*fp32", "*fp32"], ["*fp32", "*fp32", "*fp32", "*i32", "*i32"]
    first, later = NUM_FIRST_PIVOTS, [NUM_FIRST_PIVOTS, NUM_PIVOTS, MAX_HELD]
    drawn = [logits, "*i32", "*fp32", "*i32", "*fp32", "*i32"]
    return [
        Case("slices", "summarise_kernel", [logits, "*fp32", "*i32", "i32:16", "i32:16", "i32", SLICE], warps=8),
        Case("truncation", "count_kernel", [logits, "*i32", *counted, *sizes, SLICE, COUNT_TILE, padded_slices, first], warps=8),
        Case("truncation", "search_kernel", [logits, "*i32", *searched, *sizes, SEARCH_TILE, padded_slices, *later], warps=16),
        Case("sampling", "draw_kernel", [*drawn, *sizes, SLICE, DRAW_TILE, padded_slices]),
    ]


PICKED = ["*i32", "*fp32", "*i32", "*fp32", "*i32", "*i64", "i32", "i32"]
CASES = [
    *(case for logits, padded in (("*fp32", 32), ("*bf16", 64), ("*fp16", 1)) for case in cases(logits, padded)),
    *(Case("sampling", "pick_kernel", [*PICKED, greedy, padded], warps=1) for greedy in (True, False) for padded in (1, 64)),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(map(str, CASES), compile_cases(CASES), strict=True))


@pytest.mark.parametrize("case", map(str, CASES))
def test_it_compiles_for_sm_90(compiled: dict[str, Compiled], case: str) -> None:
    assert compiled[case].error == ""


def test_noise_is_made_of_exact_logarithms_and_keys_of_exact_quotients(compiled: dict[str, Compiled]) -> None:
    ptx = [made.ptx for case, made in compiled.items() if "draw_kernel" in case]
    assert len(ptx) == 3
    for text in ptx:
        assert "lg2.approx" not in text
        assert "div.rn.f32" in text
        assert "mul.hi.u32" in text
