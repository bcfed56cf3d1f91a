"""What the faces must know of the served model, read from its Hugging Face directory. Never loads weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from ..core.errors import ModelError
from ..core.topology import ModelSpec

_FILES = ("*.json", "*.jinja", "*.model", "merges.txt")  # all that a router needs of a repository


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """temperature and what follows are the model's own defaults (generation_config.json)."""

    name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def model_directory(spec: ModelSpec) -> Path:
    """The directory of a model: the path itself, or a snapshot of its small files from the hub. Raises ModelError."""
    path = Path(spec.path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or spec.path.startswith((".", "~")) or spec.path.count("/") != 1:
        raise ModelError(f"model.path: {spec.path} is not a directory")
    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=list(_FILES)))
    except Exception as error:
        raise ModelError(f"model.path: {spec.path} is no directory and cannot be fetched from the hub: {error}") from error


def load_model_info(spec: ModelSpec, directory: Path) -> ModelInfo:
    """Read config.json and generation_config.json. Raises ModelError naming the file and the key."""
    config = read_json(directory / "config.json", required=True)
    generation = read_json(directory / "generation_config.json")
    own_limit = _integer(config, "max_position_embeddings", directory)
    limit = own_limit if spec.max_model_len is None else spec.max_model_len
    if limit > own_limit:
        raise ModelError(f"model.max_model_len: {limit} is more than the model's own limit of {own_limit} tokens")
    return ModelInfo(
        name=spec.served_name,
        max_model_len=limit,
        vocab_size=_integer(config, "vocab_size", directory),
        dtype=spec.dtype,
        eos_token_ids=_eos(generation.get("eos_token_id")) or _eos(config.get("eos_token_id")),
        temperature=_number(generation.get("temperature"), 1.0),
        top_p=_number(generation.get("top_p"), 1.0),
        top_k=int(_number(generation.get("top_k"), 0)),
        min_p=_number(generation.get("min_p"), 0.0),
        repetition_penalty=_number(generation.get("repetition_penalty"), 1.0),
    )


def read_json(path: Path, required: bool = False) -> Mapping[str, object]:
    """An object from a JSON file; an empty one when the file is missing and not `required`. Raises ModelError."""
    if not path.is_file():
        if required:
            raise ModelError(f"{path} is missing: a model directory needs it")
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _integer(config: Mapping[str, object], key: str, directory: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{directory / 'config.json'}: {key} must be a positive integer, not {value!r}")
    return value


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def _eos(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if isinstance(value, list):
        return tuple(token for token in value if isinstance(token, int))
    return ()
