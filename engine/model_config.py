"""What the config.json and generation_config.json of a model folder say. Reads files of old and new spellings.

Never touches weights, and never imports torch. What is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .config_file import ConfigFile
from .model.config import ModelConfig
from .model.gemma import read_gemma2, read_gemma3
from .model.llama import read_llama
from .model.mistral import read_mistral
from .model.mixtral import read_mixtral
from .model.opt import read_opt
from .model.qwen2 import read_qwen2
from .model.qwen3 import read_qwen3
from .model.qwen3_moe import read_qwen3_moe
from .quantization_config import QuantizationConfig, read_quantization
from .rope_config import RopeConfig

__all__ = ["FAMILIES", "Family", "ModelConfig", "QuantizationConfig", "RopeConfig", "load_config"]


@dataclass(frozen=True, slots=True)
class Family:
    """A family as config.json shows it; its weights and its wiring are in `loader.LOADERS`."""

    architecture: str
    read: Callable[[ConfigFile], ModelConfig]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", read_llama),
    "mistral": Family("MistralForCausalLM", read_mistral),
    "mixtral": Family("MixtralForCausalLM", read_mixtral),
    "qwen2": Family("Qwen2ForCausalLM", read_qwen2),
    "qwen3": Family("Qwen3ForCausalLM", read_qwen3),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", read_qwen3_moe),
    "opt": Family("OPTForCausalLM", read_opt),
    "gemma2": Family("Gemma2ForCausalLM", read_gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", read_gemma3),
}  # by model_type


def load_config(path: Path) -> ModelConfig:
    """Read a model folder. Raises ModelError naming file, key and what would be right."""
    file = ConfigFile.read(path / "config.json")
    config = _family(file).read(file)
    generation_file = path / "generation_config.json"
    generation = ConfigFile.read(generation_file) if generation_file.exists() else file
    return replace(
        config,
        eos_token_ids=generation.token_ids("eos_token_id") or file.token_ids("eos_token_id"),
        bos_token_id=next(iter(generation.token_ids("bos_token_id") or file.token_ids("bos_token_id")), None),
        dtype=file.text("dtype", file.text("torch_dtype", "")),
        quantization=read_quantization(file),
    )


def _family(file: ConfigFile) -> Family:
    name = file.text("model_type", "")
    if name == "gemma3":
        raise file.wrong("model_type", "'gemma3_text': of a model that also sees images, save the text model alone")
    if name not in FAMILIES:
        raise file.wrong("model_type", f"one of {', '.join(FAMILIES)}")
    architectures = file.texts("architectures")
    if architectures and FAMILIES[name].architecture not in architectures:
        raise file.wrong("architectures", f"[{FAMILIES[name].architecture!r}] for model_type {name!r}")
    return FAMILIES[name]
