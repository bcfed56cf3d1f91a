"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and a window in the upper layers if it is switched on."""

from __future__ import annotations

from dataclasses import replace

from ..config_file import ConfigFile
from .config import ModelConfig, read_decoder, read_windows


def read_qwen2(file: ConfigFile) -> ModelConfig:
    return replace(read_decoder(file), qkv_bias=True, windows=read_upper_windows(file))


def read_upper_windows(file: ConfigFile) -> tuple[int | None, ...]:
    """Layers from max_window_layers on have the window, unless layer_types says otherwise."""
    window = file.optional_integer("sliding_window", absent=4096) if file.flag("use_sliding_window") else None
    first = file.integer("max_window_layers", 28) if not file.is_exactly("max_window_layers", 0) else 0
    return read_windows(file, window, lambda index: window is not None and index >= first)
