"""Models with random weights in Hugging Face format, for tests and benchmarks: same seed, same bytes.

They load in transformers and here like real ones, with a working byte-level BPE tokenizer, but say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from ..core.errors import ModelError
from .checkpoint import INDEX, SINGLE
from .loader import LOADERS, torch_dtype
from .model_config import FAMILIES, ModelConfig, RopeConfig, load_config
from .random_config import Shape, config_json

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

    params is a size like "110M", that of a Llama (other families come near), or an explicit `Shape`; vocab_size
    overrides the shape's. Raises ModelError for a family or size that cannot be made.
    """
    if family not in FAMILIES:
        raise ModelError(f"model family {family!r} is not supported; use one of {', '.join(FAMILIES)}")
    weights_dtype = torch_dtype(dtype)
    shape = shape_of(params) if isinstance(params, str) else params
    if vocab_size is not None:
        shape = replace(shape, vocab_size=vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(shape.vocab_size)
    # The tokenizer numbers special tokens first.
    ids: dict[str, object] = {"bos_token_id": SPECIALS.index(BOS), "eos_token_id": [SPECIALS.index(EOS), SPECIALS.index(END)]}
    _write_json(out / "config.json", config_json(family, shape, max_model_len, rope) | ids | {"dtype": dtype})
    _write_json(out / "generation_config.json", ids)
    config = load_config(out)
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
    shapes = LOADERS[config.family].shapes(config)
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
        tensors = {name: _weight(name, shapes[name], generator, config).to(dtype) for name in names}
        save_file(tensors, out / file, {"format": "pt"})
        (out / file).chmod(0o644)  # safetensors writes files that only their owner can read
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator, config: ModelConfig) -> Tensor:
    """Normal weights that keep activations and logits near unit size, so that greedy output varies and ties are rare."""
    drawn = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return drawn.mul_(0.05)
    if name.endswith("norm.weight"):
        return torch.full(shape, 1.0 - config.norm_offset).add_(drawn, alpha=0.05)
    if "embed_" in name and not config.scaled_embedding:
        return drawn
    return drawn.mul_(shape[-1] ** -0.5)


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
