"""Mistral: Llama without biases, in which every layer sees a sliding window, or everything when that is null."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from .config import ModelConfig, read_decoder


def read_mistral(file: ConfigFile) -> ModelConfig:
    if file.has("layer_types"):
        raise file.wrong("layer_types", "absent: layers of model_type 'mistral' are all alike")
    config = read_decoder(file, num_kv_heads=8)
    window = file.optional_integer("sliding_window", absent=4096)
    return config if window is None else replace(config, windows=(window,) * config.num_layers)
