"""Gemma 2 and 3 (text): norms after each half of a layer too, GEGLU, scaled embeddings, windows in most layers.

Norm weights are stored less one. Gemma 2 bounds scores and logits; Gemma 3 norms heads instead, and its layers
with a window have rotary positions of their own.
"""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from ..rope_config import RopeConfig, read_rope, read_rope_section
from .config import ModelConfig, read_decoder, read_windows


def read_gemma2(file: ConfigFile) -> ModelConfig:
    return replace(
        _read_gemma(file, read_rope(file)),
        windows=read_windows(file, file.optional_integer("sliding_window", absent=4096), lambda index: index % 2 == 0),
        attention_softcap=file.optional_number("attn_logit_softcapping", absent=50.0),
        logits_softcap=file.optional_number("final_logit_softcapping", absent=30.0),
    )


def read_gemma3(file: ConfigFile) -> ModelConfig:
    if file.has("attn_logit_softcapping"):
        raise file.wrong("attn_logit_softcapping", "null or absent: Gemma 3 does not bound attention scores")
    period = file.integer("sliding_window_pattern", file.integer("_sliding_window_pattern", 6))
    window = file.optional_integer("sliding_window", absent=4096)
    return replace(
        _read_gemma(file, _rope_of(file, "full_attention", "rope_theta", 1_000_000.0)),
        windows=read_windows(file, window, lambda index: (index + 1) % period != 0),
        local_rope=_rope_of(file, "sliding_attention", "rope_local_base_freq", 10_000.0),
        logits_softcap=file.optional_number("final_logit_softcapping", absent=None),
        head_norms=True,
    )


def _read_gemma(file: ConfigFile, rope: RopeConfig) -> ModelConfig:
    if file.flag("use_bidirectional_attention"):
        raise file.wrong("use_bidirectional_attention", "false or absent: tokens see the ones before them only")
    bias = file.flag("attention_bias")
    config = read_decoder(file, "hidden_activation", "gelu_pytorch_tanh", head_dim=256, num_kv_heads=4, tied=True, rope=rope)
    return replace(
        config,
        qkv_bias=bias,
        output_bias=bias,
        attention_scale=file.number("query_pre_attn_scalar", 256.0) ** -0.5,
        output_norms=True,
        norm_offset=1.0,
        scaled_embedding=True,
    )


def _rope_of(file: ConfigFile, layer_type: str, theta_key: str, theta: float) -> RopeConfig:
    """New files have an object for each type of layers; in old ones, rope_scaling is about full attention alone."""
    fields = file.section("rope_parameters").section(layer_type)
    if not file.has("rope_parameters") and layer_type == "full_attention":
        fields = file.section("rope_scaling")
    return read_rope_section(file, fields, fields.number("rope_theta", file.number(theta_key, theta)))
