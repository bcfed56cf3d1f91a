"""Models of known shapes with random weights, drawn on the device where they run."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from baton.engine.checkpoint import INDEX, Checkpoint
from baton.engine.layers import Weights
from baton.engine.loader import LOADERS
from baton.engine.model.interface import CausalModel
from baton.engine.model_config import ModelConfig, RopeConfig, load_config
from baton.engine.parallel import ParallelContext
from baton.engine.random_config import Shape, config_json
from baton.engine.random_model import make_model
from baton.kernels.table import make_kernels
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kind:
    """A model's family, shape, and limit."""

    family: str
    shape: Shape
    max_model_len: int = 16384

    def config(self) -> ModelConfig:
        """As it would be read from the folder of such a model."""
        with tempfile.TemporaryDirectory() as folder:
            written = config_json(self.family, self.shape, self.max_model_len, RopeConfig(theta=500000.0))
            Path(folder, "config.json").write_text(json.dumps(written | {"eos_token_id": 1}))
            return load_config(Path(folder))


KINDS = {
    "llama-3.1-8b": Kind("llama", Shape(4096, 32, 32, 8, 14336, 128256, 128)),
    "qwen3-8b": Kind("qwen3", Shape(4096, 36, 32, 8, 12288, 151936, 128)),
    "llama-3.2-1b": Kind("llama", Shape(2048, 16, 32, 8, 8192, 128256, 64, tied_embeddings=True)),
    "tiny": Kind("llama", Shape(64, 2, 4, 2, 96, 320, 16), max_model_len=256),  # proves a script where there is no GPU
}


class RandomCheckpoint(Checkpoint):
    """Satisfies every read with small normal numbers, and with ones where a norm asks. `origin` is where they are drawn."""

    def __init__(self, seed: int, origin: torch.device) -> None:
        self._origin = origin
        self._generator = torch.Generator(origin).manual_seed(seed)

    def read_into(self, out: Tensor, name: str, share: range | None = None, axis: int = 0) -> None:
        if "norm" in name:
            out.fill_(1.0)
        elif out.device == self._origin:
            out.normal_(std=out.shape[-1] ** -0.5, generator=self._generator)
        else:
            out.copy_(torch.empty(out.shape).normal_(std=out.shape[-1] ** -0.5, generator=self._generator))


def random_model(
    kind: Kind, device: torch.device, dtype: torch.dtype, kernels: str, origin: torch.device | None = None
) -> CausalModel:
    """The model on `device`; the same numbers for the same `origin`, which is the device itself if none is named."""
    config = kind.config()
    weights = Weights(RandomCheckpoint(0, origin or device), dtype, ParallelContext(), make_kernels(kernels), device)
    with torch.inference_mode():
        return LOADERS[config.family].load(config, weights, kind.max_model_len)


def num_parameters(kind: Kind) -> int:
    """Of the products of a step: the embedding is looked up, and counts only where it is the head too."""
    config = kind.config()
    shapes = LOADERS[config.family].shapes(config)
    total = 0
    for name, shape in shapes.items():
        if name != "model.embed_tokens.weight" or config.tied_embeddings:
            size = 1
            for each in shape:
                size *= each
            total += size
    return total


def write_model(kind: Kind, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """A folder that workers can load: the numbers are drawn on `device`, a layer of them at a time in memory."""
    small = Shape(64, 1, 1, 1, 64, kind.shape.vocab_size, 64)
    make_model(folder, small, kind.family, max_model_len=kind.max_model_len)  # tokenizer and ids; config and weights follow
    ids = json.loads((folder / "generation_config.json").read_text())
    written = config_json(kind.family, kind.shape, kind.max_model_len, RopeConfig(theta=500000.0))
    (folder / "config.json").write_text(json.dumps(written | ids | {"dtype": str(dtype).removeprefix("torch.")}))
    config = load_config(folder)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    source, files = RandomCheckpoint(0, device), dict[str, str]()
    for number, group in enumerate(_by_layer(LOADERS[config.family].shapes(config))):
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in group.items()}
        for name, tensor in tensors.items():
            source.read_into(tensor, name)
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file)
        files |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def _by_layer(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else name, {})[name] = shape
    return list(groups.values())
