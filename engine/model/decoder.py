"""The decoder of most families: attention and an MLP, each behind an RMSNorm, over rotary positions.

Families are told apart by what their layers are made of, never in here. Tokens of all rows of a step are packed:
every tensor starts with T packed tokens. Only attention looks at rows, and it comes from outside.
Read `Decoder.forward`, then `DecoderLayer`. Shapes use the letters of `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.interface import LayerParts, LayerStack, PagedAttention
from ...kernels.table import Kernels
from ..layers import Embedding, GatedMLP, Map, Normed, RowLinear, Scaled, SelfAttention, Softcapped, Weights
from ..parallel import ParallelContext
from ..rotary import RotaryTable, rotary_table
from .config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer.

    rotary  which of the model's tables turns its queries and keys
    """

    attention_norm: Tensor  # [E]
    attention: SelfAttention
    rotary: int
    mlp_norm: Tensor  # [E]
    mlp: Map  # E -> E


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model; see `interface.CausalModel`.

    stack  all layers but the last, where the kernels run them in one go
    """

    config: ModelConfig
    parallel: ParallelContext
    kernels: Kernels
    max_model_len: int
    embedding: Map  # tokens [T] -> [T, E]
    rotary: tuple[RotaryTable, ...]
    layers: tuple[DecoderLayer, ...]
    norm: Tensor  # [E]
    head: Map  # E -> V
    stack: LayerStack | None

    def forward(self, tokens: Tensor, positions: Tensor, attention: PagedAttention, sampled: Tensor) -> Tensor:
        """Run one step: tokens, positions [T]; sampled [R] -> logits [R, V]."""
        kernels, eps = self.kernels, self.config.norm_eps
        x = self.embedding(tokens)  # [T, E]
        turns = [table.at(positions) for table in self.rotary]
        last = len(self.layers) - 1
        normed = kernels.rms_norm(x, self.layers[0].attention_norm, eps)
        if self.stack is not None:
            self.stack.run(x, normed, attention, turns)
        for index in range(0 if self.stack is None else last, last + 1):
            layer = self.layers[index]
            mixed = layer.attention.mix(index, normed, attention, turns[layer.rotary])  # [T, H * D]
            if index == last and sampled.shape[0] < tokens.shape[0]:
                # The KV of the last layer is stored; beyond that, only tokens that are sampled from matter.
                x, mixed = x[sampled], mixed[sampled]
            x, normed = kernels.add_rms_norm(x, layer.attention.output(mixed), layer.mlp_norm, eps)
            next_norm = self.norm if index == last else self.layers[index + 1].attention_norm
            x, normed = kernels.add_rms_norm(x, layer.mlp(normed), next_norm, eps)
        return self.head(normed)


class MLPLoader(Protocol):
    """The MLP half of a family's layers, given the number of a layer."""

    def shapes(self, config: ModelConfig, layer: int) -> Shapes: ...

    def load(self, config: ModelConfig, weights: Weights, layer: int) -> Map: ...


@dataclass(frozen=True, slots=True)
class GatedMLPLoader:
    """See `layers.GatedMLP`."""

    def shapes(self, config: ModelConfig, layer: int) -> Shapes:
        hidden, inner = config.hidden_size, config.intermediate_size
        into, out_of = (inner, hidden), (hidden, inner)
        parts = (("gate_proj", into), ("up_proj", into), ("down_proj", out_of))
        return linear_shapes({f"{layer_name(layer)}.mlp.{part}": shape for part, shape in parts}, config.mlp_bias)

    def load(self, config: ModelConfig, weights: Weights, layer: int) -> Map:
        name = f"{layer_name(layer)}.mlp"
        inner = weights.parallel.share(config.intermediate_size, "MLP columns")
        halves = [(f"{name}.gate_proj", inner), (f"{name}.up_proj", inner)]
        return GatedMLP(
            weights.column(halves, config.hidden_size, config.mlp_bias),
            config.activation,
            weights.row(f"{name}.down_proj", inner, config.hidden_size, config.mlp_bias),
        )


@dataclass(frozen=True, slots=True)
class DecoderLoader:
    """See `interface.ModelLoader`."""

    mlp: MLPLoader = GatedMLPLoader()

    def shapes(self, config: ModelConfig) -> Shapes:
        hidden, vocabulary = (config.hidden_size,), (config.vocab_size, config.hidden_size)
        shapes: Shapes = {"model.embed_tokens.weight": vocabulary}
        for index in range(config.num_layers):
            layer = layer_name(index)
            shapes |= {f"{layer}.{name}.weight": hidden for name in _norm_names(config)}
            shapes |= attention_shapes(config, f"{layer}.self_attn", "o_proj")
            shapes |= self.mlp.shapes(config, index)
        shapes["model.norm.weight"] = hidden
        return shapes if config.tied_embeddings else shapes | {"lm_head.weight": vocabulary}

    def load(self, config: ModelConfig, weights: Weights, max_model_len: int) -> Decoder:
        ropes = [rope for rope in (config.rope, config.local_rope) if rope is not None]
        embedding, head = _embedding_and_head(config, weights)
        layers = tuple(self._layer(config, weights, index) for index in range(config.num_layers))
        return Decoder(
            config=config,
            parallel=weights.parallel,
            kernels=weights.kernels,
            max_model_len=max_model_len,
            embedding=embedding,
            rotary=tuple(rotary_table(rope, config.head_dim, max_model_len, weights.dtype, weights.device) for rope in ropes),
            layers=layers,
            norm=weights.norm("model.norm", config.hidden_size, config.norm_offset),
            head=head,
            stack=_stack(config, weights, layers),
        )

    def _layer(self, config: ModelConfig, weights: Weights, index: int) -> DecoderLayer:
        layer, eps = layer_name(index), config.norm_eps
        norms = [weights.norm(f"{layer}.{name}", config.hidden_size, config.norm_offset) for name in _norm_names(config)]
        attention = weights.attention(config, f"{layer}.self_attn", index, "o_proj")
        mlp = self.mlp.load(config, weights, index)
        if config.output_norms:
            after_attention, after_mlp = norms[2:]
            attention = replace(attention, output=Normed(attention.output, after_attention, eps, weights.kernels))
            mlp = Normed(mlp, after_mlp, eps, weights.kernels)
        rotary = 1 if config.local_rope is not None and attention.spec.window is not None else 0
        return DecoderLayer(norms[0], attention, rotary, norms[1], mlp)


def layer_name(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{index}"


def linear_shapes(weights: Mapping[str, tuple[int, ...]], bias: bool) -> Shapes:
    """The tensors of linears, given the shapes of their weights [outputs, inputs]."""
    shapes = {f"{name}.weight": shape for name, shape in weights.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in weights.items()} if bias else shapes


def attention_shapes(config: ModelConfig, name: str, output: str) -> Shapes:
    """The tensors of `Weights.attention`."""
    hidden, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    shapes = linear_shapes({f"{name}.{part}": (size, hidden) for part, size in rows.items()}, config.qkv_bias)
    shapes |= linear_shapes({f"{name}.{output}": (hidden, queries)}, config.output_bias)
    if config.head_norms:
        shapes |= {f"{name}.{which}_norm.weight": (config.head_dim,) for which in "qk"}
    return shapes


def _norm_names(config: ModelConfig) -> tuple[str, ...]:
    """The norms before attention and before the MLP, then those behind them. One name has two meanings."""
    if config.output_norms:
        return "input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def _stack(config: ModelConfig, weights: Weights, layers: tuple[DecoderLayer, ...]) -> LayerStack | None:
    """All layers but the last, if they are of the common kind. The last one stays apart: most tokens leave in its middle."""
    parts = []
    for layer, following in pairwise(layers):
        attention, mlp = layer.attention, layer.mlp
        if weights.parallel.size > 1 or not (isinstance(attention.output, RowLinear) and isinstance(mlp, GatedMLP)):
            return None
        norms = None if attention.norms is None else (attention.norms.query, attention.norms.key)
        parts.append(
            LayerParts(
                qkv=attention.qkv.linear,
                output=attention.output.linear,
                head_dim=attention.head_dim,
                head_norms=norms,
                spec=attention.spec,
                turn=layer.rotary,
                mlp_norm=layer.mlp_norm,
                gate_up=mlp.gate_up.linear,
                activation=mlp.activation,
                down=mlp.down.linear,
                next_norm=following.attention_norm,
            )
        )
    return weights.kernels.stack(parts, config.norm_eps) if parts else None


def _embedding_and_head(config: ModelConfig, weights: Weights) -> tuple[Map, Map]:
    shape = config.vocab_size, config.hidden_size
    linear = weights.linear("model.embed_tokens" if config.tied_embeddings else "lm_head", *shape)
    embedding: Map = linear.rows
    if not config.tied_embeddings:
        embedding = Embedding(weights.tensor("model.embed_tokens.weight", *shape))
    if config.scaled_embedding:
        factor = torch.tensor(math.sqrt(config.hidden_size)).to(weights.dtype)  # rounded first, as the model was trained
        embedding = Scaled(embedding, float(factor))
    return embedding, linear if config.logits_softcap is None else Softcapped(linear, config.logits_softcap)
