"""Models with random weights in Hugging Face format, for tests and benchmarks: same seed, same bytes.

They load in transformers and here like real ones, with a working byte-level BPE tokenizer, but say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from ..core.errors import ModelError
from .checkpoint import INDEX, SINGLE
from .loader import torch_dtype
from .model.llama import llama_shapes
from .model_config import FAMILIES, ModelConfig, RopeConfig

SHARD_BYTES = 128 << 20
BOS, EOS, USER, ASSISTANT, END = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (BOS, EOS, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Enough plain text for a few hundred merges; what it says does not matter.
CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other foxes are watching the dogs. ",
    "A request is routed to a worker, the worker computes the prompt, and the tokens are streamed to the client. ",
    "There is no one who loves pain itself, who seeks after it and wants to have it, simply because it is pain. ",
    "import this; for index, value in enumerate(values): print(index, value, sep=', ') # and return the result\n",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model. `params` of the command line chooses one; see `shape_of`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int = 16384
    head_dim: int = 64
    tied_embeddings: bool = False


SHAPES = {"110M": Shape(768, 12, 12, 4, 2304), "16M": Shape(256, 8, 4, 2, 1024)}


def make_model(
    out: Path,
    params: str | Shape = "110M",
    family: str = "llama",
    seed: int = 0,
    dtype: str = "bfloat16",
    max_model_len: int = 4096,
    vocab_size: int | None = None,
    rope: RopeConfig = RopeConfig(),
    shard_bytes: int = SHARD_BYTES,
) -> ModelConfig:
    """Write a model folder; existing files of the same names are replaced.

    params is a size like "110M" or an explicit `Shape`; vocab_size overrides the shape's. Raises ModelError
    for a family or size that cannot be made.
    """
    if family not in FAMILIES:
        raise ModelError(f"model family {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    weights_dtype = torch_dtype(dtype)
    shape = shape_of(params) if isinstance(params, str) else params
    if vocab_size is not None:
        shape = replace(shape, vocab_size=vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(shape.vocab_size)
    config = _config(family, shape, dtype, max_model_len, rope)
    _write_json(out / "config.json", _config_json(config))
    _write_json(out / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)})
    _write_tokenizer(out, tokenizer, max_model_len)
    _write_weights(out, config, weights_dtype, seed, shard_bytes)
    return config


def shape_of(params: str) -> Shape:
    """The shape of a size: "110M" and "16M" are fixed, others ("1M", "350M", "1.5B") come near the number asked for."""
    if params in SHAPES:
        return SHAPES[params]
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])", params)
    if not match:
        raise ModelError(f"model size {params!r} cannot be read; write a number and K, M or B, like 110M")
    wanted = float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2]]
    return min(_candidates(), key=lambda shape: abs(num_params(shape) - wanted))


def num_params(shape: Shape) -> int:
    """Parameters of a shape, embeddings included."""
    per_layer = shape.hidden_size * (
        2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 3 * shape.intermediate_size + 2
    )
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return shape.num_layers * per_layer + embeddings + shape.hidden_size


def _candidates() -> Iterator[Shape]:
    """Shapes of usual proportions. Small ones get a small vocabulary, which would be most of the model else."""
    for heads in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 64):
        width = heads * 64
        kv_heads = next(k for k in (8, 4, 2, 1) if heads % k == 0 and (k < heads or heads == 1))
        for layers in range(max(2, heads // 2), heads + 10):
            vocab_size = 16384 if heads >= 4 else 2048
            yield Shape(width, layers, heads, kv_heads, 3 * width, vocab_size, tied_embeddings=heads < 4)


def _config(family: str, shape: Shape, dtype: str, max_model_len: int, rope: RopeConfig) -> ModelConfig:
    return ModelConfig(
        family=family,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=max_model_len,
        norm_eps=1e-5,
        rope=rope,
        tied_embeddings=shape.tied_embeddings,
        eos_token_ids=(SPECIALS.index(EOS), SPECIALS.index(END)),  # the tokenizer numbers special tokens first
        bos_token_id=SPECIALS.index(BOS),
        dtype=dtype,
    )


def _config_json(config: ModelConfig) -> dict[str, object]:
    rope: dict[str, object] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    if config.rope.kind != "default":
        rope["factor"] = config.rope.factor
    if config.rope.kind == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_max_position
    return {
        "architectures": [FAMILIES[config.family]],
        "model_type": config.family,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "dtype": config.dtype,
    }


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most 512 tokens; ids above exist in the model only."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIALS) + len(alphabet)
    if vocab_size < smallest:
        raise ModelError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(512, vocab_size), special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text * 2 for text in CORPUS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    return tokenizer


def _write_tokenizer(out: Path, tokenizer: Tokenizer, max_model_len: int) -> None:
    (out / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
    settings: Mapping[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT, END],
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", settings)


def _write_weights(out: Path, config: ModelConfig, dtype: torch.dtype, seed: int, shard_bytes: int) -> None:
    """Shards of at most `shard_bytes` (or one tensor each), with an index when there are several."""
    for stale in [out / INDEX, *out.glob("model*.safetensors")]:
        stale.unlink(missing_ok=True)
    shapes = llama_shapes(config)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, tensor_shape in shapes.items():
        num_bytes = dtype.itemsize
        for size in tensor_shape:
            num_bytes *= size
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
        total += num_bytes
    generator = torch.Generator().manual_seed(seed)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _weight(name, shapes[name], generator).to(dtype) for name in names}, out / file, {"format": "pt"})
        (out / file).chmod(0o644)  # safetensors writes files that only their owner can read
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal weights that keep activations and logits near unit size, so that greedy output varies and ties are rare."""
    if name.endswith("norm.weight"):
        return torch.ones(shape).add_(torch.randn(shape, generator=generator), alpha=0.05)
    if name == "model.embed_tokens.weight":
        return torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5)


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
