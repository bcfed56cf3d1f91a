"""What is read of config.json, family by family, in the spellings that published models have; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from baton.core.errors import ModelError
from baton.engine.model_config import FAMILIES, ModelConfig, RopeConfig, load_config

SIZES: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
OPT: dict[str, object] = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
GEMMA = SIZES | {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16}
SLIDING, FULL = "sliding_attention", "full_attention"


def read(folder: Path, family: str, **settings: object) -> ModelConfig:
    sizes = OPT if family == "opt" else GEMMA if family.startswith("gemma") else SIZES
    (folder / "config.json").write_text(json.dumps({"model_type": family} | sizes | settings))
    return load_config(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_architecture_is_checked(tmp_path: Path, family: str) -> None:
    assert read(tmp_path, family, architectures=[FAMILIES[family].architecture]).family == family
    with pytest.raises(ModelError, match=rf"architectures is .*; it must be \['{FAMILIES[family].architecture}'\]"):
        read(tmp_path, family, architectures=["BertModel"])


def test_mistral_windows(tmp_path: Path) -> None:
    assert read(tmp_path, "mistral", sliding_window=64).windows == (64,) * 4
    assert read(tmp_path, "mistral", sliding_window=None).windows == ()
    bare = read(tmp_path, "mistral", num_key_value_heads=None)
    assert (bare.windows, bare.num_kv_heads) == ((4096,) * 4, 4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_windows(tmp_path: Path, family: str) -> None:
    """The published files name a window and switch it off."""
    off = read(tmp_path, family, use_sliding_window=False, sliding_window=32, max_window_layers=2)
    on = read(tmp_path, family, use_sliding_window=True, sliding_window=32, max_window_layers=2)
    all_on = read(tmp_path, family, use_sliding_window=True, sliding_window=32, max_window_layers=0)
    listed = read(tmp_path, family, use_sliding_window=True, sliding_window=32, layer_types=[FULL, SLIDING, FULL, FULL])
    saved = read(tmp_path, family, use_sliding_window=False, sliding_window=None, layer_types=[FULL] * 4)
    assert [config.windows for config in (off, saved)] == [(), ()]
    assert on.windows == (None, None, 32, 32)
    assert all_on.windows == (32,) * 4
    assert listed.windows == (None, 32, None, None)


def test_qwen_biases_and_heads(tmp_path: Path) -> None:
    two, three = read(tmp_path, "qwen2", torch_dtype="bfloat16"), read(tmp_path, "qwen3", attention_bias=True)
    assert (two.qkv_bias, two.output_bias, two.head_dim, two.head_norms, two.dtype) == (True, False, 16, False, "bfloat16")
    assert (three.qkv_bias, three.output_bias, three.head_dim, three.head_norms) == (True, True, 128, True)


def test_gemma2(tmp_path: Path) -> None:
    config = read(tmp_path, "gemma2", hidden_act="gelu_pytorch_tanh", sliding_window=64, cache_implementation="hybrid")
    assert config.windows == (64, None, 64, None)
    assert (config.attention_scale, config.attention_softcap, config.logits_softcap) == (0.25, 50.0, 30.0)
    assert (config.norm_offset, config.tied_embeddings, config.activation) == (1.0, True, "gelu_tanh")
    bare = read(tmp_path, "gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (bare.attention_softcap, bare.logits_softcap) == (None, None)


def test_gemma3_in_both_spellings(tmp_path: Path) -> None:
    old = read(
        tmp_path,
        "gemma3_text",
        sliding_window=32,
        sliding_window_pattern=3,
        rope_theta=500_000,
        rope_local_base_freq=9000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = read(
        tmp_path,
        "gemma3_text",
        sliding_window=32,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING],
        rope_parameters={
            FULL: {"rope_type": "linear", "rope_theta": 500_000, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 9000.0},
        },
    )
    assert old == new
    assert old.windows == (32, 32, None, 32)
    assert old.rope == RopeConfig("linear", 500_000.0, 8.0)
    assert old.local_rope == RopeConfig(theta=9000.0)
    sparse = read(tmp_path, "gemma3_text")
    assert (sparse.rope, sparse.local_rope) == (RopeConfig(theta=1e6), RopeConfig())
    assert sparse.windows == (4096,) * 4  # the pattern is six layers long


def test_opt(tmp_path: Path) -> None:
    config = read(tmp_path, "opt", activation_function="relu", do_layer_norm_before=True, word_embed_proj_dim=64)
    assert (config.intermediate_size, config.num_kv_heads, config.head_dim, config.rope) == (96, 4, 16, None)
    assert (config.qkv_bias, config.mlp_bias, config.norm_first, config.embedding_size) == (True, True, True, None)
    assert (config.eos_token_ids, config.bos_token_id, config.tied_embeddings) == ((2,), 2, True)
    small = read(tmp_path, "opt", do_layer_norm_before=False, word_embed_proj_dim=32, enable_bias=False)
    assert (small.norm_first, small.embedding_size, small.qkv_bias, small.output_bias) == (False, 32, False, False)


def test_yarn_in_both_spellings(tmp_path: Path) -> None:
    old = read(tmp_path, "qwen2", rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0})
    new = read(
        tmp_path,
        "qwen2",
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512},
    )
    assert old == new
    assert old.rope == RopeConfig("yarn", 1e6, 4.0, original_max_position=512, attention_factor=1.138629436111989)
    outside = read(
        tmp_path,
        "llama",
        original_max_position_embeddings=128,
        rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    )
    assert outside.rope == RopeConfig("yarn", factor=4.0, original_max_position=128, attention_factor=1.5)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma3", {}, "model_type is 'gemma3'; it must be 'gemma3_text'"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types is .* must be absent"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; it must be a whole number"),
        ("qwen2", {"layer_types": [FULL] * 3}, "layer_types is .* must be a list of 4"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "for each layer 'full_attention' or 'sliding_attention'"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "layer_types is .* full attention in every layer"),
        ("qwen3", {"hidden_act": "relu"}, "hidden_act is 'relu'; it must be 'silu'"),
        ("llama", {"head_dim": 15}, "head_dim is 15; it must be even"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 1.0}}}, "rope_parameters is .* one object of plain values"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "rope_scaling.factor is None"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "beta_fast": 1}},
            "rope_scaling.beta_fast is 1; it must be more than beta_slow",
        ),
        ("llama", {"rope_scaling": {"type": "yarn", "truncate": 1}}, "rope_scaling.truncate is 1; it must be true or false"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'; it must be 'gelu_pytorch_tanh'"),
        (
            "gemma2",
            {"sliding_window": None},
            "layer_types is None; it must be full attention in every layer, or a sliding_window set",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; it must be null"),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "su"}}}, "rope_parameters.full_attention.rope_type is 'su'"),
        ("opt", {"activation_function": "silu"}, "activation_function is 'silu'; it must be 'relu' or 'gelu'"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ("opt", {"num_attention_heads": 5}, r"num_attention_heads is 5; it must be a divisor of hidden_size \(64\)"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, family: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        read(tmp_path, family, **settings)
    assert str(refused.value).startswith(str(tmp_path / "config.json"))
