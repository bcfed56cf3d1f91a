"""The model folder: where it is, and what its config.json and generation_config.json say.

Reads Hugging Face folders of both spellings of the rotary settings (`rope_theta` + `rope_scaling`, and
`rope_parameters`). Never touches weights, and never imports torch. What is not supported is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ModelError

FAMILIES = {"llama": "LlamaForCausalLM"}  # model_type -> architecture
ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. kind is one of ROPE_KINDS; the fields after `theta` matter to the scaled kinds only."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model.

    max_position_embeddings  positions that the model was made for: the longest sequence
    eos_token_ids  end a sequence; those of generation_config.json win over those of config.json
    dtype          type the weights are stored in, empty when config.json does not say
    """

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = ""


def resolve_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The folder of a model: the path itself, or a snapshot of a hub id at `revision`.

    Raises ModelError when it is neither a folder nor a hub id that can be fetched (or was fetched before).
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    looks_like_path = path_or_hub_id.startswith(("/", ".", "~")) or path_or_hub_id.count("/") > 1
    if folder.exists() or looks_like_path or not path_or_hub_id:
        raise ModelError(f"no model folder at {path_or_hub_id!r}; give a folder that holds config.json, or a hub id (owner/name)")
    # Imported here: a folder needs nothing of the hub's client.
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client raises errors of a dozen unrelated classes
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{path_or_hub_id!r} is not a folder here, and the model hub did not give it{at}: {error}. "
            "Give the path of a model folder, or check the id and the network"
        ) from error


def load_config(path: Path) -> ModelConfig:
    """Read a model folder. Raises ModelError naming file, key and what would be right."""
    config = _Fields.read(path / "config.json")
    family = _family(config)
    _refuse_unsupported(config)
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    hidden_size = config.integer("hidden_size")
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    max_position = config.integer("max_position_embeddings", 2048)
    generation_file = path / "generation_config.json"
    generation = _Fields.read(generation_file) if generation_file.exists() else config
    return ModelConfig(
        family=family,
        num_layers=config.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=config.integer("head_dim", max(1, hidden_size // num_heads)),
        vocab_size=config.integer("vocab_size"),
        max_position_embeddings=max_position,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_rope(config, max_position),
        tied_embeddings=config.flag("tie_word_embeddings"),
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
        eos_token_ids=generation.token_ids("eos_token_id") or config.token_ids("eos_token_id"),
        bos_token_id=next(iter(generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")), None),
        dtype=config.text("dtype", config.text("torch_dtype", "")),
    )


class _Fields:
    """Typed reading of one JSON object, with errors that name file and key."""

    def __init__(self, file: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self._file = file
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> _Fields:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(f"{file}: {error.strerror}; a model folder holds config.json and safetensors files") from error
        except ValueError as error:
            raise ModelError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{file} holds a JSON {type(values).__name__}, not an object")
        return cls(file, values)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def wrong(self, key: str, right: str) -> ModelError:
        return ModelError(f"{self._file}: {self._prefix}{key} is {self._values.get(key)!r}; it must be {right}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; empty when absent."""
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def section(self, key: str) -> _Fields:
        """A nested object; an empty one when absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return _Fields(self._file, value or {}, f"{self._prefix}{key}.")


def _family(config: _Fields) -> str:
    family = config.text("model_type", "")
    if family not in FAMILIES:
        raise config.wrong("model_type", f"one of {', '.join(FAMILIES)}")
    architectures = config.texts("architectures")
    if architectures and FAMILIES[family] not in architectures:
        raise config.wrong("architectures", f"[{FAMILIES[family]!r}] for model_type {family!r}")
    return family


def _refuse_unsupported(config: _Fields) -> None:
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.wrong("hidden_act", "'silu'")
    if config.has("quantization_config"):
        raise config.wrong("quantization_config", "absent: quantised checkpoints are not supported")
    for fields in (config, config.section("rope_parameters")):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.wrong("partial_rotary_factor", "1.0 or absent")


def _rope(config: _Fields, max_position: int) -> RopeConfig:
    name = "rope_parameters" if config.has("rope_parameters") else "rope_scaling"
    fields = config.section(name)
    theta = fields.number("rope_theta", config.number("rope_theta", 10000.0))
    key = "rope_type" if fields.has("rope_type") else "type"
    kind = fields.text(key, "default")
    if kind not in ROPE_KINDS:
        raise fields.wrong(key, f"one of {', '.join(ROPE_KINDS)}")
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(kind, theta, fields.number("factor"))
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        raise fields.wrong("low_freq_factor", f"less than high_freq_factor ({high})")
    original = fields.integer("original_max_position_embeddings", max_position)
    return RopeConfig(kind, theta, fields.number("factor"), low, high, original)
