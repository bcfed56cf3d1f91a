"""What is known of a model before any weight is read, and what most families read of config.json alike.

Never imports torch. The families' own files say what is special about each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config_file import ConfigFile
from ..experts_config import ExpertsConfig
from ..quantization_config import QuantizationConfig
from ..rope_config import RopeConfig, read_rope

# Names in config.json -> ours.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a model. What has a default is special to some families.

    max_position_embeddings  positions that the model was made for: the longest sequence
    attention_scale  factor of the attention scores
    rope             rotary positions; None for learned ones (OPT)
    local_rope       those of layers with a window, where they differ (Gemma 3)
    windows          positions each layer sees, itself included, None for all; empty when no layer has a window
    attention_softcap, logits_softcap   bounds of attention scores and of logits (Gemma 2)
    activation       of the MLP: "silu" and "gelu_tanh" of gated ones, "relu" and "gelu" of OPT
    head_norms       queries and keys are normed per head (Qwen 3, Gemma 3)
    output_norms     what a half of a layer adds is normed too (Gemma)
    norm_offset      what is added to stored norm weights (1 for Gemma)
    norm_first       norms stand before each half of a layer, and at the end; else after each half (OPT 350M)
    embedding_size   width of the embeddings where they are projected to hidden_size (OPT 350M); None when they aren't
    scaled_embedding embeddings are multiplied by sqrt(hidden_size) (Gemma)
    experts          the routed MLPs; None when all layers have a plain one
    eos_token_ids    end a sequence; those of generation_config.json win over those of config.json
    dtype            type the weights are stored in, empty when config.json does not say
    quantization     None when all weights are stored as they are
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
    rope: RopeConfig | None
    attention_scale: float
    activation: str
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    head_norms: bool = False
    output_norms: bool = False
    norm_offset: float = 0.0
    norm_first: bool = True
    embedding_size: int | None = None
    scaled_embedding: bool = False
    experts: ExpertsConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: str = ""
    quantization: QuantizationConfig | None = None


def read_decoder(
    file: ConfigFile,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    tied: bool = False,
    rope: RopeConfig | None = None,
) -> ModelConfig:
    """What the families of `decoder` share. The defaults are those of a file without the key.

    activation_key and activation name the only activation that the family is supported with; `rope` is given by
    families that have more than one.
    """
    num_heads = file.integer("num_attention_heads")
    kv_heads = file.optional_integer("num_key_value_heads", absent=num_kv_heads) or num_heads
    if num_heads % kv_heads:
        raise file.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    hidden_size = file.integer("hidden_size")
    head_dim = file.integer("head_dim", head_dim or max(1, hidden_size // num_heads))
    if head_dim % 2:
        raise file.wrong("head_dim", "even: rotary positions turn pairs of dimensions")
    return ModelConfig(
        family=file.text("model_type", ""),
        num_layers=file.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=file.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=file.integer("vocab_size"),
        max_position_embeddings=file.integer("max_position_embeddings", 2048),
        norm_eps=file.number("rms_norm_eps", 1e-6),
        rope=rope or read_rope(file),
        attention_scale=head_dim**-0.5,
        activation=read_activation(file, activation_key, activation),
        tied_embeddings=file.flag("tie_word_embeddings", default=tied),
    )


def read_activation(file: ConfigFile, key: str, *allowed: str) -> str:
    """Our name of the activation that `key` names; the first of `allowed` when it is absent."""
    found = ACTIVATIONS.get(file.text(key, allowed[0]))
    if found not in [ACTIVATIONS[name] for name in allowed]:
        raise file.wrong(key, " or ".join(map(repr, allowed)))
    return found


def read_windows(file: ConfigFile, window: int | None, slides: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer. `slides` says which layers have it when the file has no layer_types."""
    num_layers = file.integer("num_hidden_layers")
    kinds = file.texts("layer_types") or tuple(LAYER_TYPES[slides(index)] for index in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= set(LAYER_TYPES):
        raise file.wrong("layer_types", f"a list of {num_layers}, for each layer {' or '.join(map(repr, LAYER_TYPES))}")
    if window is None and "sliding_attention" in kinds:
        raise file.wrong("layer_types", "full attention in every layer, or a sliding_window set and switched on")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()
