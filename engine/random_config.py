"""The config.json of models with random weights, in each family's own words. `model_config` reads them back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import ModelError
from .model_config import FAMILIES
from .rope_config import RopeConfig

# Routed experts share the inner size of a plain MLP out among them, so that the model stays as large.
NUM_EXPERTS, NUM_CHOSEN = 8, 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model. `params` of the command line chooses one; see `random_model.shape_of`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int = 16384
    head_dim: int = 64
    tied_embeddings: bool = False


def config_json(family: str, shape: Shape, max_model_len: int, rope: RopeConfig) -> dict[str, object]:
    """Everything but dtype and token ids. Where there are windows, they are half of max_model_len."""
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_model_len,
        "tie_word_embeddings": shape.tied_embeddings,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        **_WRITERS[family](shape, max(1, max_model_len // 2), rope),
    }


def _decoder(shape: Shape, rope: RopeConfig) -> dict[str, object]:
    return {
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope_json(rope),
    }


def _rope_json(rope: RopeConfig) -> dict[str, object]:
    written: dict[str, object] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        written["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = rope.original_max_position
    if rope.kind == "llama3":
        written |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        written["attention_factor"] = rope.attention_factor
    return written


def _llama(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _mistral(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {"hidden_act": "silu", "sliding_window": window}


def _qwen(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {"hidden_act": "silu", "use_sliding_window": False}


def _mixtral(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {
        "hidden_act": "silu",
        "sliding_window": None,
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": NUM_CHOSEN,
        "intermediate_size": max(1, shape.intermediate_size // NUM_EXPERTS),
    }


def _qwen3_moe(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _qwen(shape, window, rope) | {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": NUM_CHOSEN,
        "moe_intermediate_size": max(1, shape.intermediate_size // NUM_EXPERTS),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma2(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": window,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def _gemma3(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    return _decoder(shape, rope) | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": window,
        "rope_parameters": {"full_attention": _rope_json(rope), "sliding_attention": _rope_json(RopeConfig())},
    }


def _opt(shape: Shape, window: int, rope: RopeConfig) -> dict[str, object]:
    if shape.num_heads * shape.head_dim != shape.hidden_size:
        size, heads = shape.hidden_size, shape.num_heads
        raise ModelError(f"{heads} heads of {shape.head_dim} do not fill a hidden size of {size}; those of OPT must")
    if rope.kind != "default":
        raise ModelError(f"rotary scaling {rope.kind!r} is not possible: OPT has no rotary positions")
    return {"ffn_dim": shape.intermediate_size, "word_embed_proj_dim": shape.hidden_size, "activation_function": "relu"}


_WRITERS: dict[str, Callable[[Shape, int, RopeConfig], dict[str, object]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "opt": _opt,
}
