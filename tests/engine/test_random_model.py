"""Random models: reproducible, loadable by transformers, and worth testing with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from baton.core.errors import ModelError
from baton.engine.loader import LOADERS, load_config, load_model
from baton.engine.model_config import FAMILIES, RopeConfig
from baton.engine.random_model import SHAPES, Shape, make_model, num_params, shape_of
from baton.tests.engine.model_rig import logits_of, oracle_logits, prompt_of
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = Shape(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=48, vocab_size=600, head_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    make_model(out, SMALL, max_model_len=64)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_transformers_loads_it(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == num_params(SMALL)
    assert model.generation_config.eos_token_id == list(load_config(folder).eos_token_ids)
    assert set(LOADERS["llama"].shapes(load_config(folder))) == set(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_made_as_transformers_knows_it(tmp_path: Path, family: str) -> None:
    config = make_model(tmp_path, SMALL, family, dtype="float32", max_model_len=64, shard_bytes=60_000)
    oracle, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert load_config(tmp_path) == config
    prompt = prompt_of(60, vocab_size=SMALL.vocab_size)
    expected = oracle_logits(oracle.eval(), prompt)
    torch.testing.assert_close(logits_of(load_model(tmp_path, "float32"), prompt), expected, rtol=1e-4, atol=1e-4)
    assert len(set(expected.argmax(-1).tolist())) > 10  # greedy output varies


def test_the_tokenizer_works(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = 'Grüße, 世界! def f(x):\n\treturn "x" * 3 🙂'
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == load_config(folder).bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert max(ids) < SMALL.vocab_size
    assert len(tokenizer.encode("the worker computes the tokens")) < 15  # merges are used
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.convert_tokens_to_ids("<|end|>") in load_config(folder).eos_token_ids


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "a", SMALL, max_model_len=64)
    assert contents(tmp_path / "a") == contents(folder)
    make_model(tmp_path / "a", SMALL, max_model_len=64, seed=1)
    changed = contents(tmp_path / "a")
    assert [name for name, content in contents(folder).items() if changed[name] != content] == ["model.safetensors"]


def test_large_models_are_sharded_and_old_files_replaced(folder: Path, tmp_path: Path) -> None:
    make_model(tmp_path, SMALL, shard_bytes=30_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert max(file.stat().st_size for file in tmp_path.glob("model-*.safetensors")) < 45_000  # one tensor may be larger
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    make_model(tmp_path, SMALL)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    load_model(tmp_path)


@pytest.mark.parametrize(("params", "shape"), SHAPES.items())
def test_fixed_sizes(params: str, shape: Shape) -> None:
    assert shape_of(params) == shape
    assert num_params(shape) == pytest.approx(float(params[:-1]) * 1e6, rel=0.03)
    assert (shape.vocab_size, shape.tied_embeddings) == (16384, False)


@pytest.mark.parametrize("params", ["500K", "1M", "5M", "30M", "125M", "1.3B", "7B"])
def test_other_sizes_come_near(params: str) -> None:
    shape = shape_of(params)
    wanted = float(params[:-1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[params[-1]]
    assert num_params(shape) == pytest.approx(wanted, rel=0.15)
    assert shape.num_heads % shape.num_kv_heads == 0


def test_a_named_size_is_written(tmp_path: Path) -> None:
    config = make_model(tmp_path, "1M", dtype="float16", vocab_size=1000)
    assert load_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    assert config.vocab_size == 1000


def test_impossible_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'110X' cannot be read"):
        make_model(tmp_path, "110X")
    with pytest.raises(ModelError, match="family 'gpt9' is not supported; use one of llama"):
        make_model(tmp_path, "1M", family="gpt9")
    with pytest.raises(ModelError, match="vocab_size is 100"):
        make_model(tmp_path, "1M", vocab_size=100)
    with pytest.raises(ModelError, match="dtype"):
        make_model(tmp_path, "1M", dtype="int4")
    with pytest.raises(ModelError, match="2 heads of 24 do not fill a hidden size of 32"):
        make_model(tmp_path, replace(SMALL, head_dim=24), family="opt")
    with pytest.raises(ModelError, match="'linear' is not possible: OPT has no rotary positions"):
        make_model(tmp_path, SMALL, family="opt", rope=RopeConfig("linear", factor=2.0))
