"""The attention kernels become machine code of an H100 as serving code launches them, and nothing of it spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu" / "compiled.py"


class Made(NamedTuple):
    """One kernel in one use; see `dry_device.Compiled`."""

    use: str
    name: str
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]


@pytest.fixture(scope="module")
def kernels() -> list[Made]:
    """From another process: this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Made(**entry) for entry in json.loads(done.stdout.splitlines()[-1])["kernels"]]


def test_nothing_spills_and_all_fits_on_a_processor(kernels: list[Made]) -> None:
    assert {made.name for made in kernels} == {"_turn_and_store", "_decode", "_sum_parts", "_prefill"}
    for made in kernels:
        assert made.stack_bytes == 0, made
        assert made.instructions["local"] == 0, made
        assert made.shared_bytes <= 227 << 10, made


def test_prefill_multiplies_in_warp_groups_on_tiles_that_are_copied_ahead(kernels: list[Made]) -> None:
    prefill = [made for made in kernels if made.name == "_prefill"]
    assert len({made.use for made in prefill}) == len(prefill) >= 4
    for made in prefill:
        assert made.instructions["wgmma"] > 0, made
        assert made.instructions["mma"] == 0, made
        assert made.instructions["cp.async"] > 0, made


def test_three_decode_programs_fit_on_a_processor(kernels: list[Made]) -> None:
    """`step_tensors.PROGRAMS_PER_PROCESSOR` of them, for the caches and head sizes of most models."""
    decode = [made for made in kernels if made.name == "_decode"]
    for made in decode:
        assert made.instructions["cp.async"] > 0, made
        assert made.instructions["mma"] > 0, made
        assert 3 * (made.shared_bytes + 1024) <= 228 << 10, made  # the system takes 1 KiB for each program
