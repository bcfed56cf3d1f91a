"""From a model's name to a model that runs: folder, config, weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import ModelError
from ..kernels.table import make_kernels
from .checkpoint import Checkpoint
from .model.interface import CausalModel
from .model.llama import load_llama
from .model_config import ModelConfig, load_config, resolve_model
from .parallel import ParallelContext

__all__ = ["DTYPES", "LOADERS", "ModelConfig", "load_config", "load_model", "resolve_model", "torch_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADERS = {"llama": load_llama}


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a dtype's name. Raises ModelError for one that is not supported."""
    if name not in DTYPES:
        raise ModelError(f"model dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    path: Path,
    dtype: str = "bfloat16",
    parallel: ParallelContext = ParallelContext(),
    max_model_len: int | None = None,
    kernels: str = "cpu",
    threads: int = 1,
    deterministic: bool = False,
) -> CausalModel:
    """Load the model of a folder, weights converted to `dtype`.

    max_model_len None takes the model's own limit. Raises ModelError, before any weight is read, when the
    folder is incomplete, damaged, of an unsupported kind, or does not fit what is asked.
    """
    config = load_config(path)
    weights_dtype = torch_dtype(dtype)
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= limit:
        raise ModelError(f"max_model_len is {max_model_len}; {path / 'config.json'} allows 1 to {limit} positions")
    made = make_kernels(kernels, threads, deterministic)
    with torch.inference_mode():
        return LOADERS[config.family](config, Checkpoint(path), weights_dtype, parallel, made, max_model_len or limit)
