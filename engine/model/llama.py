"""Llama: grouped-query attention, rotary positions, RMSNorm before each half of a layer, SwiGLU. The plainest decoder."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from .config import ModelConfig, read_decoder


def read_llama(file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    return replace(read_decoder(file), qkv_bias=bias, output_bias=bias, mlp_bias=file.flag("mlp_bias"))
