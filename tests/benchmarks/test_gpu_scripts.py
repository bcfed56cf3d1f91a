"""The GPU's scripts prove themselves without one, say so when they have nothing to measure, and go on where they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, float | str]:
    assert done.returncode == 0, done.stderr
    last: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return last


def test_the_engine_is_compared_and_measured() -> None:
    found = figures(run("engine.py", "--device", "cpu"))
    assert (found["device"], found["model"], found["tokens_compared"]) == ("CPU", "tiny", 72)
    assert {"decode_b1_fraction", "decode_b4_ms", "host_overhead_b4", "prefill_mfu", "offline_tok_s"} <= set(found)
    assert all(value > 0 for name, value in found.items() if isinstance(value, float) and not name.startswith("host_overhead"))


def test_a_handoff_between_two_processes_is_compared_and_measured() -> None:
    found = figures(run("transfer.py", "--device", "cpu", "--quick"))
    assert (found["device"], found["transport"], found["mib"]) == ("CPU", "grpc", 0.125)
    assert float(found["exposed_ms"]) > 0


def test_peers_are_measured() -> None:
    found = figures(run("peers.py", "--device", "cpu"))
    assert {"sdpa_prefill_share", "sdpa_decode_b2_share", "transformers_b1_ms", "transformers_b2_ms"} <= set(found)


@pytest.mark.cluster
@pytest.mark.parametrize("system", ["1p1d", "mixed"])
def test_a_cluster_is_served_and_measured(system: str) -> None:
    found = figures(run("served.py", system, "--device", "cpu"))
    assert found["system"] == system
    assert float(found["tok_s_closed"]) > 0
    assert {"attainment_50", "attainment_70", "attainment_85", "goodput"} <= set(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [("engine.py",), ("transfer.py",), ("peers.py",), ("served.py", "mixed")])
def test_without_a_gpu_they_end_with_status_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no CUDA device" in done.stderr


def runner(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(FOLDER / "run.sh"), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHON": sys.executable})


def test_a_part_that_is_done_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    first = runner(tmp_path, "transfer")
    assert first.returncode == 0, first.stderr
    left = json.loads((tmp_path / "transfer.json").read_text().splitlines()[-1])
    assert f"| {left['exposed_ms']} |" in (tmp_path / "README.md").read_text()
    assert "transfer: done before" in runner(tmp_path, "transfer").stdout
    assert "transfer: transfer.py --device cpu" in runner(tmp_path, "--again", "transfer").stdout


def test_what_fails_is_told_and_leaves_no_figures(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\ncase $1 in *report.py) exit 0;; esac\necho boom >&2\nexit 7\n")
    (tmp_path / "python").chmod(0o755)
    command = ["sh", str(FOLDER / "run.sh"), "--out", str(tmp_path / "out"), "transfer"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHON": str(tmp_path / "python")}
    )
    assert done.returncode == 1
    assert "transfer: ended with status 7" in done.stderr
    assert not (tmp_path / "out" / "transfer.json").exists()
    assert (tmp_path / "out" / "transfer.log").read_text() == "boom\n"


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = runner(tmp_path, "enigne")
    assert done.returncode == 2
    assert "no part is called enigne; these are: kernels engine transfer served peers" in done.stderr
