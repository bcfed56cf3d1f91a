"""The script proves itself without a GPU, and says so when it has nothing to measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_interpreted_it_checks_every_kernel() -> None:
    done = run("--interpret")
    assert done.returncode == 0, done.stderr
    right = [line for line in done.stdout.splitlines() if line.startswith("right: ")]
    assert any("float8_e4m3fn" in line for line in right)
    names = {line.split()[0] for line in done.stdout.splitlines()[1:-1] if not line.startswith("right: ")}
    assert {"copy_gb_s", "decode_b2_share", "decode_b2_fp8_step_us", "prefill_20_share", "store_20_us"} <= names
    assert json.loads(done.stdout.splitlines()[-1]) == {"interpreted_figures": len(names)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_status_2() -> None:
    done = run("--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr
