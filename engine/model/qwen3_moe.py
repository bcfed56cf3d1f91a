"""Qwen 3 MoE: Qwen 3 whose MLPs are routed experts, but for layers that keep a plain one."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from ..experts_config import read_experts
from .config import ModelConfig, read_decoder


def read_qwen3_moe(file: ConfigFile) -> ModelConfig:
    config = read_decoder(file, num_kv_heads=4)
    bias = file.flag("attention_bias")
    window = file.optional_integer("sliding_window", absent=4096) if file.flag("use_sliding_window") else None
    experts = read_experts(file, "num_experts", 128, 8, file.integer("moe_intermediate_size", 768), file.flag("norm_topk_prob"))
    period, listed = file.integer("decoder_sparse_step", 1), file.indices("mlp_only_layers")
    dense = [index for index in range(config.num_layers) if index in listed or (index + 1) % period]
    return replace(
        config,
        head_norms=True,
        qkv_bias=bias,
        output_bias=bias,
        windows=() if window is None else (window,) * config.num_layers,
        experts=replace(experts, dense_layers=frozenset(dense)),
    )
