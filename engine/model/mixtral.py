"""Mixtral: Mistral whose MLPs are routed experts, two of eight, weighted to a sum of 1."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from ..experts_config import read_experts
from ..rope_config import read_rope
from .config import ModelConfig, read_decoder


def read_mixtral(file: ConfigFile) -> ModelConfig:
    config = read_decoder(file, num_kv_heads=8)
    window = file.optional_integer("sliding_window", absent=None)
    return replace(
        config,
        norm_eps=file.number("rms_norm_eps", 1e-5),
        rope=read_rope(file, theta=1_000_000.0),
        windows=() if window is None else (window,) * config.num_layers,
        experts=read_experts(file, "num_local_experts", 8, 2, config.intermediate_size, normalized=True),
    )
