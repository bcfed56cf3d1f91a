"""Llama: grouped-query attention, rotary positions, RMSNorm before each half of a layer, SwiGLU.

Tokens of all rows of a step are packed: every tensor here starts with T packed tokens. Only attention looks
at rows, and it comes from outside. Read `Llama.forward`, then `LlamaLayer`.

Shapes: T tokens, E hidden size, H query heads and K KV heads of this rank, D head dimension, F inner size
of this rank, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...core.errors import ModelError
from ...kernels.batch import AttentionSpec
from ...kernels.table import Kernels, Linear, PagedAttention
from ..checkpoint import Checkpoint
from ..layers import ColumnLinear, RowLinear, load_column, load_row, rotary_tables, scaled_range
from ..model_config import ModelConfig
from ..parallel import ParallelContext


@dataclass(frozen=True, slots=True)
class LlamaLayer:
    """Weights of one layer. Projections that share an input are one linear."""

    attention_norm: Tensor  # [E]
    qkv: ColumnLinear  # E -> (H + 2K) * D, query heads first, then keys, then values
    output: RowLinear  # H * D -> E
    mlp_norm: Tensor  # [E]
    gate_up: ColumnLinear  # E -> 2F, gate first
    down: RowLinear  # F -> E


@dataclass(frozen=True, slots=True)
class Llama:
    """A loaded Llama; see `interface.CausalModel`. cos and sin are [max_model_len, D / 2]."""

    config: ModelConfig
    parallel: ParallelContext
    kernels: Kernels
    max_model_len: int
    embedding: Tensor | None  # [V, E]; None when it is the head's weight
    layers: tuple[LlamaLayer, ...]
    norm: Tensor  # [E]
    head: Linear  # E -> V
    spec: AttentionSpec
    cos: Tensor
    sin: Tensor

    def forward(self, tokens: Tensor, positions: Tensor, attention: PagedAttention, sampled: Tensor) -> Tensor:
        """Run one step: tokens, positions [T]; sampled [R] -> logits [R, V]."""
        kernels, eps = self.kernels, self.config.norm_eps
        x = self.head.rows(tokens) if self.embedding is None else functional.embedding(tokens, self.embedding)  # [T, E]
        turn = self.cos[positions], self.sin[positions]  # [T, D / 2] each
        last = len(self.layers) - 1
        normed = kernels.rms_norm(x, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(normed).view(x.shape[0], -1, self.config.head_dim)  # [T, H + 2K, D]
            mixed = attention.run(index, qkv, self.spec, turn)  # [T, H * D]
            if index == last and sampled.shape[0] < tokens.shape[0]:
                # The KV of the last layer is stored; beyond that, only tokens that are sampled from matter.
                x, mixed = x[sampled], mixed[sampled]
            x, normed = kernels.add_rms_norm(x, layer.output(mixed), layer.mlp_norm, eps)
            delta = layer.down(kernels.silu_mul(layer.gate_up(normed)))  # [T, E]
            next_norm = self.norm if index == last else self.layers[index + 1].attention_norm
            x, normed = kernels.add_rms_norm(x, delta, next_norm, eps)
        return self.head(normed)


def llama_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for part, projections, bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
            for name, shape in projections.items():
                shapes[f"{prefix}.{part}.{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}.{part}.{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def load_llama(
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    parallel: ParallelContext,
    kernels: Kernels,
    max_model_len: int,
) -> Llama:
    """Read this rank's share of the weights. Raises ModelError before any work when they don't fit the config."""
    if parallel.pipeline_size > 1:
        raise ModelError(f"pipeline_parallel is {parallel.pipeline_size}; this model family runs in one stage: set it to 1")
    checkpoint.require(llama_shapes(config))
    hidden = (config.hidden_size,)
    vocabulary = (config.vocab_size, config.hidden_size)
    layers = tuple(_load_layer(config, checkpoint, index, dtype, kernels, parallel) for index in range(config.num_layers))
    embedding = None if config.tied_embeddings else checkpoint.read("model.embed_tokens.weight", vocabulary, dtype)
    head = checkpoint.read("model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight", vocabulary, dtype)
    spec = AttentionSpec(1.0 / math.sqrt(config.head_dim))
    norm = checkpoint.read("model.norm.weight", hidden, dtype)
    cos, sin = rotary_tables(config, max_model_len, dtype)
    return Llama(config, parallel, kernels, max_model_len, embedding, layers, norm, kernels.linear(head, None), spec, cos, sin)


def _load_layer(
    config: ModelConfig, checkpoint: Checkpoint, index: int, dtype: torch.dtype, kernels: Kernels, parallel: ParallelContext
) -> LlamaLayer:
    prefix, hidden = f"model.layers.{index}", config.hidden_size
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    queries = scaled_range(parallel.share(config.num_heads, "query heads"), config.head_dim)
    keys = scaled_range(parallel.share(config.num_kv_heads, "KV heads"), config.head_dim)
    inner = parallel.share(config.intermediate_size, "MLP columns")
    projections = [(f"{attention}.q_proj", queries), (f"{attention}.k_proj", keys), (f"{attention}.v_proj", keys)]
    halves = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
    return LlamaLayer(
        attention_norm=checkpoint.read(f"{prefix}.input_layernorm.weight", (hidden,), dtype),
        qkv=load_column(checkpoint, projections, hidden, config.attention_bias, dtype, kernels),
        output=load_row(checkpoint, f"{attention}.o_proj", queries, hidden, config.attention_bias, dtype, kernels, parallel),
        mlp_norm=checkpoint.read(f"{prefix}.post_attention_layernorm.weight", (hidden,), dtype),
        gate_up=load_column(checkpoint, halves, hidden, config.mlp_bias, dtype, kernels),
        down=load_row(checkpoint, f"{mlp}.down_proj", inner, hidden, config.mlp_bias, dtype, kernels, parallel),
    )
