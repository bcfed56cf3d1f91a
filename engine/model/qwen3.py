"""Qwen 3: Llama whose queries and keys are normed per head, with heads of 128 unless it says otherwise."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from .config import ModelConfig, read_decoder
from .qwen2 import read_upper_windows


def read_qwen3(file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    config = read_decoder(file, head_dim=128)
    return replace(config, head_norms=True, qkv_bias=bias, output_bias=bias, windows=read_upper_windows(file))
