"""What is read of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from baton.api.model_info import load_model_info, model_directory
from baton.core.errors import ModelError
from baton.core.topology import ModelSpec
from baton.tests.router.router_process import MODEL

CONFIG = {"max_position_embeddings": 64, "vocab_size": 10, "eos_token_id": 2}


def write(folder: Path, **files: object) -> ModelSpec:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return ModelSpec(str(folder))


def test_shipped_model() -> None:
    info = load_model_info(ModelSpec(str(MODEL)), MODEL)
    assert (info.name, info.max_model_len, info.vocab_size) == ("pydoc-llama", 1024, 4096)
    assert info.eos_token_ids == (1, 4)


def test_generation_config_wins(tmp_path: Path) -> None:
    spec = write(tmp_path, config=CONFIG)
    assert load_model_info(spec, tmp_path).eos_token_ids == (2,)
    write(tmp_path, generation_config={"eos_token_id": [3, 4], "temperature": 0.6, "top_p": 0.9, "top_k": 20})
    info = load_model_info(spec, tmp_path)
    assert info.eos_token_ids == (3, 4)
    assert (info.temperature, info.top_p, info.top_k) == (0.6, 0.9, 20)
    write(tmp_path, generation_config={"eos_token_id": None, "top_k": None})
    assert load_model_info(spec, tmp_path).eos_token_ids == (2,)


def test_limit_may_be_lowered_only(tmp_path: Path) -> None:
    write(tmp_path, config=CONFIG)
    assert load_model_info(ModelSpec(str(tmp_path), max_model_len=32), tmp_path).max_model_len == 32
    with pytest.raises(ModelError, match="own limit of 64"):
        load_model_info(ModelSpec(str(tmp_path), max_model_len=65), tmp_path)


def test_problems_name_the_file(tmp_path: Path) -> None:
    spec = ModelSpec(str(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model_info(spec, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model_info(spec, tmp_path)
    write(tmp_path, config={"vocab_size": 10})
    with pytest.raises(ModelError, match="max_position_embeddings"):
        load_model_info(spec, tmp_path)


def test_directory(tmp_path: Path) -> None:
    assert model_directory(ModelSpec(str(tmp_path))) == tmp_path
    with pytest.raises(ModelError, match="not a directory"):
        model_directory(ModelSpec(str(tmp_path / "missing")))
