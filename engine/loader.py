"""From a model's name to a model that runs: folder, config, weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ..core.errors import ModelError, Unavailable
from ..kernels.native_abi import TYPES
from ..kernels.table import make_kernels
from .layers import Weights
from .model.decoder import DecoderLoader
from .model.experts import RoutedMLPLoader
from .model.interface import CausalModel, ModelLoader
from .model.opt_decoder import OptLoader
from .model_config import ModelConfig, load_config
from .model_folder import resolve_model
from .parallel import ParallelContext
from .quantized import open_checkpoint

__all__ = ["DTYPES", "LOADERS", "ModelConfig", "load_config", "load_model", "resolve_model", "torch_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOADERS: dict[str, ModelLoader] = {
    "llama": DecoderLoader(),
    "mistral": DecoderLoader(),
    "mixtral": DecoderLoader(RoutedMLPLoader("block_sparse_moe", gate="w1", up="w3", down="w2")),
    "qwen2": DecoderLoader(),
    "qwen3": DecoderLoader(),
    "qwen3_moe": DecoderLoader(RoutedMLPLoader("mlp", gate="gate_proj", up="up_proj", down="down_proj")),
    "gemma2": DecoderLoader(),
    "gemma3_text": DecoderLoader(),
    "opt": OptLoader(),
}  # by ModelConfig.family


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
    device: torch.device = torch.device("cpu"),
) -> CausalModel:
    """Load the model of a folder, weights converted to `dtype`, tensor by tensor onto `device`.

    max_model_len None takes the model's own limit. Raises ModelError, before any weight is read, when the
    folder is incomplete, damaged, of an unsupported kind, or does not fit what is asked.
    """
    config = load_config(path)
    weights_dtype = torch_dtype(dtype)
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= limit:
        raise ModelError(f"max_model_len is {max_model_len}; {path / 'config.json'} allows 1 to {limit} positions")
    if parallel.pipeline_size > 1:
        raise ModelError(f"pipeline_parallel is {parallel.pipeline_size}; models run in one stage: set it to 1")
    if deterministic and weights_dtype not in TYPES:
        raise ModelError(f"deterministic results are not to be had in {dtype}; use bfloat16 or float32")
    loader = LOADERS[config.family]
    checkpoint = open_checkpoint(path, config.quantization)
    checkpoint.require(loader.shapes(config))
    try:
        made = make_kernels(kernels, threads, deterministic)
    except Unavailable as error:
        wanted = f"kernels {kernels!r}{' with deterministic results' if deterministic else ''}"
        raise ModelError(f"{wanted} are not to be had here: {error}") from error
    weights = Weights(checkpoint, weights_dtype, parallel, made, device)
    with torch.inference_mode():
        return loader.load(config, weights, max_model_len or limit)
