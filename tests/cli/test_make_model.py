"""`baton make-model` writes a folder that the engine reads."""

from __future__ import annotations

from pathlib import Path

from baton.cli.main import app
from baton.engine.model_config import load_config
from typer.testing import CliRunner


def test_a_small_model_is_written_and_can_be_read(tmp_path: Path):
    result = CliRunner().invoke(app, ["make-model", "--out", str(tmp_path / "m"), "--params", "1M", "--max-model-len", "128"])
    assert result.exit_code == 0, result.output
    config = load_config(tmp_path / "m")
    assert (config.family, config.max_position_embeddings) == ("llama", 128)
    assert list((tmp_path / "m").glob("*.safetensors"))


def test_an_unknown_family_is_a_failure(tmp_path: Path):
    result = CliRunner().invoke(app, ["make-model", "--out", str(tmp_path / "m"), "--family", "gpt5"])
    assert result.exit_code == 2
    assert "gpt5" in result.stderr
