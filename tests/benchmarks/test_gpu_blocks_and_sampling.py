"""The script proves itself without a GPU, and says so when it has nothing to measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "blocks_and_sampling.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_interpreted_it_checks_every_kernel() -> None:
    done = run("--interpret")
    assert done.returncode == 0, done.stderr
    names = {line.split()[0] for line in done.stdout.splitlines()[1:-1]}
    assert {"gather_whole_share", "scatter_fp8_share", "norm_3_us", "sample_flat_top_p_2_us", "fp8_widened_3_us"} <= names
    assert json.loads(done.stdout.splitlines()[-1]) == {"interpreted_figures": len(names) + 1}  # and that of the copy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_status_2() -> None:
    done = run("--quick")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr


def test_a_part_that_is_not_there_is_refused() -> None:
    done = run("gathers")
    assert done.returncode == 2
    assert "no part is called gathers; these are: moves" in done.stderr
