"""`baton plan` from its arguments to its files, and every refusal before anything is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from baton.cli.files import write_all
from baton.cli.main import app
from baton.core.errors import InvalidRequest
from baton.deploy.settings import load_topology
from baton.placement.profile import MeasuredCost, Profile, write_profile
from baton.simulator.cost import LinearCost
from click.testing import Result
from typer.testing import CliRunner


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--workers", "1", "--quick", *arguments])


SMALL = ("--model", "OPT-1.3B", "--gpu", "L4:2", "--ttft", "1", "--tpot", "0.1", "--input-tokens", "200", "--output-tokens", "4")


def test_a_plan_is_written(tmp_path: Path) -> None:
    done = plan(*SMALL, "--out", str(tmp_path / "plan"))
    assert done.exit_code == 0, done.output
    assert "requests/s" in done.stdout
    topology = load_topology(tmp_path / "plan" / "topology.yaml")
    assert topology.cluster == "planned"
    assert topology.slo.ttft == 1.0
    text = (tmp_path / "plan" / "topology.yaml").read_text()
    assert text.startswith("# Planned by `baton plan`.")
    split = any(pool.tensor_parallel * pool.pipeline_parallel > 1 for pool in topology.pools)
    assert ("# not yet deployable: " in text) is split
    assert (tmp_path / "plan" / "plan.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "OPT-9000B", "--gpu", "L4:1"), "model 'OPT-9000B' is neither a folder"),
        (("--model", "OPT-13B", "--gpu", "Abacus:1"), "accelerator 'Abacus' is not known"),
        (("--model", "OPT-66B", "--gpu", "L4:1", "--lengths", "sharegpt"), "does not fit on 1 L4"),
        (("--model", "OPT-13B", "--gpu", "H100:1"), "no workload"),
        (("--model", "OPT-13B", "--gpu", "H100:1", "--input-tokens", "9000", "--output-tokens", "1"), "the model takes 2048"),
        (("--model", "OPT-13B", "--gpu", "H100:1", "--lengths", "poems"), "'poems' is not known"),
        (("--model", "OPT-13B", "--gpu", "H100:1", "--lengths", "sharegpt", "--objective", "fame"), "'fame' is unknown"),
        (("--model", "OPT-13B", "--gpu", "H100:1", "--lengths", "sharegpt", "--name", "My Plan"), "cluster: 'My Plan'"),
    ],
)
def test_bad_arguments_write_nothing(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = plan(*arguments, "--out", str(tmp_path / "plan"))
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert not (tmp_path / "plan").exists()


def test_bad_traces_name_the_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    common = ("--model", "OPT-13B", "--gpu", "H100:1", "--trace", str(trace))
    assert "holds no request" in " ".join(plan(*common).output.split())
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,many,3\n")
    done = plan(*common)
    assert done.exit_code == 2
    assert "line 2: ContextTokens 'many' is no whole number" in " ".join(done.output.split())


def test_objectives_that_nothing_meets_are_answered(tmp_path: Path) -> None:
    arguments = (
        "--model",
        "OPT-13B",
        "--gpu",
        "H100:2",
        "--lengths",
        "sharegpt",
        "--ttft",
        "0.0001",
        "--out",
        str(tmp_path / "plan"),
    )
    done = plan(*arguments)
    assert done.exit_code == 1
    output = " ".join(done.output.split())
    assert "no placement on 2 H100 on 1 node reaches TTFT 0.0001 s" in output
    assert "the nearest that can be reached" in output
    assert not (tmp_path / "plan").exists()


def test_a_target_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "plan").write_text("mine")
    done = plan(*SMALL, "--out", str(tmp_path / "plan"))
    assert done.exit_code == 2
    assert "is a file" in done.output
    assert (tmp_path / "plan").read_text() == "mine"


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    cost = MeasuredCost(1, 1, LinearCost(1e-3, token=1e-5), {})
    other = Profile("Llama-3.1-8B", "8b", "L4", "bfloat16", "auto", 0, 32, 0.0, {}, (cost,))
    write_profile(other, tmp_path / "profile.yaml")
    done = plan(*SMALL, "--profile", str(tmp_path / "profile.yaml"), "--out", str(tmp_path / "plan"))
    assert done.exit_code == 2
    output = " ".join(done.output.split())
    assert "measured with Llama-3.1-8B (sizes 8b) and says nothing of OPT-1.3B" in output
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--model and --gpu say what to plan for"),
        (("--model", "OPT-13B"), "--model and --gpu say what to plan for"),
        (("--from-live", "nobody", "--gpu", "L4:1", "--rate", "3"), "--gpu, --rate: the running cluster says this"),
    ],
)
def test_what_to_plan_for_must_be_said(arguments: tuple[str, ...], words: str) -> None:
    done = plan(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())


def test_a_cluster_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    done = plan("--from-live", "nobody")
    assert done.exit_code == 1
    assert "cluster nobody is not running on this machine" in " ".join(done.output.split())


def test_both_files_are_written_or_none(tmp_path: Path) -> None:
    write_all({tmp_path / "new" / "a": "1", tmp_path / "new" / "b": "2"})
    assert [(path.name, path.read_text()) for path in sorted((tmp_path / "new").iterdir())] == [("a", "1"), ("b", "2")]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for impossible in (tmp_path / "file" / "b", tmp_path / "folder"):
        with pytest.raises(InvalidRequest, match="cannot be written"):
            write_all({tmp_path / "new" / "a": "3", impossible: "4"})
    assert [(path.name, path.read_text()) for path in sorted((tmp_path / "new").iterdir())] == [("a", "1"), ("b", "2")]


def test_a_refusal_imports_nothing_heavy() -> None:
    """Torch alone takes longer than an answer may."""
    code = (
        "import sys\n"
        "from baton.cli.main import app\n"
        "try:\n    app(['plan', '--model', 'OPT-13B', '--gpu', 'Abacus:1', '--lengths', 'sharegpt'])\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'grpc', 'jinja2', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout
    assert "'Abacus' is not known" in done.stderr


@pytest.mark.cluster
def test_the_same_plan_is_found_on_ray(tmp_path: Path) -> None:
    """In a process of its own, as Ray and this one's threads and signals would get in each other's way."""
    here = plan(*SMALL)
    command = [sys.executable, "-m", "baton.cli.main", "plan", "--quick", "--ray", *SMALL, "--out", str(tmp_path / "plan")]
    environment = os.environ | {"RAY_ADDRESS": "local", "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(here.stdout)
    assert (tmp_path / "plan" / "topology.yaml").is_file()
