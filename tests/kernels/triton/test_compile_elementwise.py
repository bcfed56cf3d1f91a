"""Norms and gates become machine code of an H100 that moves 16 bytes at a time."""

from __future__ import annotations

import pytest
from baton.tests.kernels.triton.sm90 import Case, Compiled, compile_cases

pytest.importorskip("triton")

CASES = [
    Case("norms", "rms_norm_kernel", ["*bf16", "*bf16", "*bf16", "i32", "i32:16", "fp32", 4096, 1, 4096], warps=16),
    Case("norms", "rms_norm_kernel", ["*fp32", "*fp32", "*fp32", "i32", "i32:16", "fp32", 768, 1, 1024]),
    Case(
        "norms",
        "add_rms_norm_kernel",
        ["*bf16"] * 5 + ["i32", "i32:16", "i32:16", "fp32", 16384, 1, 16384],
        warps=16,
    ),
    Case("norms", "norm_heads_kernel", ["*bf16"] * 3 + ["i32", "i32", "i32", "i32:16", "fp32", 128, 8, 128]),
    *(
        Case("gates", "gate_kernel", [kind, kind, "i32:16", "i32:16", silu, 1024])
        for kind in ("*bf16", "*fp16")
        for silu in (True, False)
    ),
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return dict(zip(map(str, CASES), compile_cases(CASES), strict=True))


@pytest.mark.parametrize("case", map(str, CASES))
def test_it_compiles_for_sm_90(compiled: dict[str, Compiled], case: str) -> None:
    assert compiled[case].error == ""
    assert "ld.global.v4" in compiled[case].ptx
    assert "st.global.v4" in compiled[case].ptx
