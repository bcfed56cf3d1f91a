"""`baton profile`: a file that `baton simulate` and `baton plan` read, and bad arguments refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from baton.cli.main import app
from baton.engine.random_model import make_model
from baton.placement.profile import read_profile
from typer.testing import CliRunner


def run(*arguments: str):
    return CliRunner().invoke(app, ["profile", *arguments])


def test_a_profile_is_written_and_its_residuals_are_shown(tmp_path: Path):
    make_model(tmp_path / "tiny", "1M", max_model_len=1024)
    file = tmp_path / "profile.yaml"
    arguments = (
        "--out",
        str(file),
        "--quick",
        "--no-links",
        "--kernels",
        "cpu",
        "--kv-memory-mib",
        "32",
        "--max-step-tokens",
        "256",
    )
    result = run(str(tmp_path / "tiny"), *arguments)
    assert result.exit_code == 0, result.output
    profile = read_profile(file)
    assert (profile.model, profile.threads, profile.links) == ("tiny", 1, {})
    for words in ("decode context", "prefill", "% in the median", "host overhead", "wrote"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("name", "message"), [("no-such-folder/profile.yaml", "is no folder; make it first"), ("", "is a folder; needed: a file")]
)
def test_a_file_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path, name: str, message: str):
    result = run("/no/such/model", "--out", str(tmp_path / name))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_model_that_is_not_there_is_refused(tmp_path: Path):
    result = run(str(tmp_path / "none"), "--out", str(tmp_path / "profile.yaml"))
    assert result.exit_code == 1
    assert "none" in result.stderr
    assert list(tmp_path.iterdir()) == []
