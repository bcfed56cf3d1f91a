"""Sizes of models: parameters against published totals, KV, parallelism, names, fingerprints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from baton.core.errors import InvalidRequest, ModelError
from baton.engine.random_config import Shape, config_json
from baton.engine.rope_config import RopeConfig
from baton.placement.model_shape import MODELS, Linear, find_model, shape_of_folder

PUBLISHED = {  # billions of parameters as their makers state them
    "OPT-13B": 12.85, "OPT-66B": 65.7, "OPT-175B": 174.6, "Llama-2-7B": 6.74, "Llama-2-13B": 13.02, "Llama-2-70B": 68.98,
    "Llama-3.2-1B": 1.236, "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.55, "Qwen3-8B": 8.19, "Qwen3-32B": 32.76,
    "Mixtral-8x7B": 46.7, "Qwen3-30B-A3B": 30.5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameters_are_those_that_were_published(name: str, billions: float):
    assert MODELS[name].num_params / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_routed_model_multiplies_with_few_of_its_weights():
    assert MODELS["Mixtral-8x7B"].active_params / 1e9 == pytest.approx(12.75, rel=0.02)
    assert MODELS["Qwen3-30B-A3B"].active_params / 1e9 == pytest.approx(3.0, rel=0.05)
    assert MODELS["Llama-3.1-8B"].flops_per_token == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.001)


def test_kv_of_a_token():
    assert MODELS["OPT-13B"].kv_bytes_per_token() == 2 * 40 * 5120 * 2
    assert MODELS["Llama-3.1-70B"].kv_bytes_per_token("fp8") == 2 * 80 * 8 * 128
    llama = MODELS["Llama-3.1-70B"]
    assert llama.rank_kv_bytes_per_token(4, 2) == llama.kv_bytes_per_token() / 8
    assert llama.rank_kv_bytes_per_token(16, 1) == llama.kv_bytes_per_token() / 8  # the 8 heads twice


def test_weights_of_the_fullest_rank():
    shape = MODELS["OPT-66B"]
    assert shape.rank_weight_bytes(1, 1) == shape.weight_bytes()
    assert shape.rank_weight_bytes(4, 1) == shape.weight_bytes() / 4
    stages = shape.rank_weight_bytes(2, 2)
    assert shape.weight_bytes() / 4 < stages < shape.weight_bytes() / 4 * 1.02
    assert shape.weight_bytes("int4") == shape.num_params / 2


def test_how_a_model_can_be_split():
    opt = MODELS["OPT-66B"]  # 72 heads
    assert opt.tensor_degrees(8) == (1, 2, 3, 4, 6, 8)
    assert opt.pipeline_degrees(8) == (1, 2, 4, 8)
    assert MODELS["Llama-3.1-70B"].tensor_degrees(64) == (1, 2, 4, 8, 16, 32, 64)
    opt.check_parallel(8, 64)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel is 5; OPT-66B .*can be split over 1, 2, 3, 4, 6") as refused:
        opt.check_parallel(5, 1)
    assert refused.value.field == "tensor_parallel"
    with pytest.raises(InvalidRequest, match=r"pipeline_parallel is 65; OPT-66B has 64 layers"):
        opt.check_parallel(1, 65)
    with pytest.raises(InvalidRequest, match=r"tensor_parallel is 0"):
        opt.check_parallel(0, 1)


def test_the_products_of_a_layer():
    assert MODELS["Llama-3.1-8B"].linears(2) == (
        Linear(4096, 2048 + 2 * 4 * 128), Linear(2048, 4096), Linear(4096, 14336), Linear(7168, 4096),
    )  # fmt: skip
    whole = MODELS["OPT-13B"]
    weights = sum(linear.inputs * linear.outputs for linear in whole.linears())
    assert weights == whole.attention_params + whole.mlp_params


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("facebook/opt-13b", "OPT-13B"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7B"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "Llama-3.1-70B"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "Mixtral-8x7B"),
        ("Qwen/Qwen3-30B-A3B", "Qwen3-30B-A3B"),
        ("llama-3.2-1b", "Llama-3.2-1B"),
    ],
)
def test_a_well_known_model_is_found_by_its_name_or_hub_id(name: str, known: str):
    assert find_model(name).name == known


def test_a_point_in_a_size_counts():
    """A plan for ten times the parameters would be no answer."""
    assert find_model("opt-1.3b").name == "OPT-1.3B"
    assert find_model("OPT-13B").name == "OPT-13B"
    assert find_model("facebook/opt-6.7b").num_params / 1e9 == pytest.approx(6.66, rel=0.01)
    for name in ("opt-1.30b", "opt-67b", "llama-31-8b"):
        with pytest.raises(InvalidRequest):
            find_model(name)


@pytest.mark.parametrize("name", ["gpt-5", "", "/no/such/folder", "llama"])
def test_an_unknown_model_is_refused_naming_the_known_ones(name: str):
    with pytest.raises(InvalidRequest, match=r"OPT-13B, OPT-30B.*Qwen3-30B-A3B") as refused:
        find_model(name)
    assert refused.value.field == "model"


def write_config(folder: Path, family: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(family, Shape(256, 8, 4, 2, 1024), 2048, RopeConfig())))
    return folder


def test_a_folder_is_read_without_its_weights(tmp_path: Path):
    shape = find_model(str(write_config(tmp_path / "small", "llama")))
    assert (shape.name, shape.num_layers, shape.num_heads, shape.num_kv_heads) == ("small", 8, 4, 2)
    assert shape.gated
    assert shape.position_embeddings == 0
    opt = shape_of_folder(write_config(tmp_path / "opt", "opt"))
    assert (opt.gated, opt.position_embeddings, opt.num_kv_heads) == (False, 2050, 4)
    assert shape_of_folder(write_config(tmp_path / "moe", "mixtral")).num_experts > 0


def test_a_damaged_folder_is_refused_by_the_engines_reader(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"config.json: hidden_size|config.json: num_attention_heads"):
        find_model(str(tmp_path))


def test_a_fingerprint_is_of_the_sizes_alone():
    llama = MODELS["Llama-3.1-8B"]
    assert replace(llama, name="other", max_model_len=8192).fingerprint == llama.fingerprint
    assert replace(llama, num_layers=31).fingerprint != llama.fingerprint
    assert len({shape.fingerprint for shape in MODELS.values()}) == len(MODELS)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InvalidRequest, match=r"dtype 'fp3' is not known; use one of float32"):
        MODELS["OPT-13B"].weight_bytes("fp3")
