"""Block moves and 8-bit linears become machine code of an H100; moves are of 16 bytes."""

from __future__ import annotations

import pytest
from baton.tests.kernels.triton.sm90 import Case, Compiled, compile_cases

pytest.importorskip("triton")

STRIDES = ["i64:16", "i32:16", "i32:16"]


def move(pool: str, staged: str, run: int, scaled: bool, scatter: bool, tile: int, warps: int) -> Case:
    scales = "*fp32" if scaled else None
    counts = ["i32", "i32", "i32", "i32"]
    return Case(
        "blocks", "move_kernel", [pool, staged, "*i32", scales, *STRIDES, *counts, run, 2048, scaled, scatter, tile], warps
    )


MOVES = [
    move(pool, staged, run, "fp8" in pool + staged and pool != staged, scatter, tile, warps)
    for pool, staged in (
        ("*bf16", "*bf16"),
        ("*bf16", "*fp8e4nv"),
        ("*fp8e4nv", "*fp16"),
        ("*fp32", "*bf16"),
        ("*fp8e4nv", "*fp8e4nv"),
    )
    for scatter in (False, True)
    for run, tile, warps in ((16384, 8192, 8),)
]
PRODUCT = ["*u8", "*fp32"]
SIZES = ["i32", "i32:16", "i32:16", "i32:16"]
OTHERS = [
    Case("fp8", "quantize_kernel", ["*bf16", "*fp8e4nv", "*fp32", "i32:16", "i32:16", 4096], warps=8),
    *(
        Case("fp8", "product_kernel", [kind, *PRODUCT, kind if biased else None, kind, *SIZES, *tiles], warps)
        for kind, biased in (("*bf16", True), ("*fp16", False))
        for tiles, warps in (((16, 32, 128), 4), ((64, 64, 128), 4), ((128, 128, 64), 8))
    ),
]
CASES = [*MOVES, *OTHERS]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(map(str, CASES), compile_cases(CASES), strict=True))


@pytest.mark.parametrize("case", map(str, CASES))
def test_it_compiles_for_sm_90(compiled: dict[str, Compiled], case: str) -> None:
    assert compiled[case].error == ""


@pytest.mark.parametrize("case", map(str, MOVES))
def test_moves_are_of_16_bytes(compiled: dict[str, Compiled], case: str) -> None:
    assert ".v4.b32" in compiled[case].ptx
