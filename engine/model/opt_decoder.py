"""The decoder of OPT: LayerNorm before (or, in OPT 350M, after) each half of a layer, learned positions, a plain MLP.

Shapes use the letters of `layers`; W is the width of the embeddings, E in all but OPT 350M.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ...kernels.interface import Linear, PagedAttention
from ...kernels.table import Kernels
from ..layers import ColumnLinear, Embedding, Map, RowLinear, SelfAttention, Weights
from ..parallel import ParallelContext
from .config import ModelConfig
from .decoder import Shapes, attention_shapes, linear_shapes

POSITION_OFFSET = 2  # rows of the position table that no position uses
DECODER = "model.decoder"


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Ba et al. 2016."""

    weight: Tensor  # [E]
    bias: Tensor  # [E]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class PlainMLP:
    """Two linears with an activation between them."""

    up: ColumnLinear  # E -> F
    activation: Map
    down: RowLinear  # F -> E

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True, slots=True)
class OptLayer:
    """One layer; each norm stands before its half, or behind it and the residual sum."""

    attention_norm: LayerNorm
    attention: SelfAttention
    mlp_norm: LayerNorm
    mlp: PlainMLP


@dataclass(frozen=True, slots=True)
class OptDecoder:
    """A loaded model; see `interface.CausalModel`."""

    config: ModelConfig
    parallel: ParallelContext
    kernels: Kernels
    max_model_len: int
    embedding: Map  # tokens [T] -> [T, W]
    project_in: Linear | None  # W -> E
    positions: Tensor  # [max_model_len, E]
    layers: tuple[OptLayer, ...]
    norm: LayerNorm | None  # None where norms stand behind the layers' halves
    project_out: Linear | None  # E -> W
    head: Linear  # W -> V

    def forward(self, tokens: Tensor, positions: Tensor, attention: PagedAttention, sampled: Tensor) -> Tensor:
        """Run one step: tokens, positions [T]; sampled [R] -> logits [R, V]."""
        x = self.embedding(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.positions[positions]  # [T, E]
        first = self.config.norm_first
        for index, layer in enumerate(self.layers):
            mixed = layer.attention.mix(index, layer.attention_norm(x) if first else x, attention, None)  # [T, H * D]
            if index == len(self.layers) - 1:
                x, mixed = x[sampled], mixed[sampled]
            x = x + layer.attention.output(mixed)
            x = x if first else layer.attention_norm(x)
            x = x + layer.mlp(layer.mlp_norm(x) if first else x)
            x = x if first else layer.mlp_norm(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.head(x)


@dataclass(frozen=True, slots=True)
class OptLoader:
    """See `interface.ModelLoader`."""

    def shapes(self, config: ModelConfig) -> Shapes:
        hidden, inner = config.hidden_size, config.intermediate_size
        width = config.embedding_size or hidden
        shapes: Shapes = {
            f"{DECODER}.embed_tokens.weight": (config.vocab_size, width),
            f"{DECODER}.embed_positions.weight": (config.max_position_embeddings + POSITION_OFFSET, hidden),
        }
        if config.embedding_size is not None:
            projections: Shapes = {f"{DECODER}.project_in": (hidden, width), f"{DECODER}.project_out": (width, hidden)}
            shapes |= linear_shapes(projections, bias=False)
        for index in range(config.num_layers):
            layer = f"{DECODER}.layers.{index}"
            shapes |= attention_shapes(config, f"{layer}.self_attn", "out_proj")
            shapes |= linear_shapes({f"{layer}.fc1": (inner, hidden), f"{layer}.fc2": (hidden, inner)}, config.mlp_bias)
            norms: Shapes = {f"{layer}.self_attn_layer_norm": (hidden,), f"{layer}.final_layer_norm": (hidden,)}
            shapes |= linear_shapes(norms, bias=True)
        if config.norm_first:
            shapes |= linear_shapes({f"{DECODER}.final_layer_norm": (hidden,)}, bias=True)
        return shapes if config.tied_embeddings else shapes | {"lm_head.weight": (config.vocab_size, width)}

    def load(self, config: ModelConfig, weights: Weights, max_model_len: int) -> OptDecoder:
        hidden, width = config.hidden_size, config.embedding_size or config.hidden_size
        projected, tied = config.embedding_size is not None, config.tied_embeddings
        positions = weights.empty(max_model_len, hidden)
        rows = range(POSITION_OFFSET, POSITION_OFFSET + max_model_len)
        weights.checkpoint.read_into(positions, f"{DECODER}.embed_positions.weight", rows)
        head = weights.linear(f"{DECODER}.embed_tokens" if tied else "lm_head", config.vocab_size, width)
        table = None if tied else weights.tensor(f"{DECODER}.embed_tokens.weight", config.vocab_size, width)
        return OptDecoder(
            config=config,
            parallel=weights.parallel,
            kernels=weights.kernels,
            max_model_len=max_model_len,
            embedding=head.rows if table is None else Embedding(table),
            project_in=weights.linear(f"{DECODER}.project_in", hidden, width) if projected else None,
            positions=positions,
            layers=tuple(_load_layer(config, weights, index) for index in range(config.num_layers)),
            norm=_load_norm(config, weights, f"{DECODER}.final_layer_norm") if config.norm_first else None,
            project_out=weights.linear(f"{DECODER}.project_out", width, hidden) if projected else None,
            head=head,
        )


def _load_layer(config: ModelConfig, weights: Weights, index: int) -> OptLayer:
    layer = f"{DECODER}.layers.{index}"
    inner = weights.parallel.share(config.intermediate_size, "MLP columns")
    activations: dict[str, Map] = {"relu": functional.relu, "gelu": functional.gelu}
    mlp = PlainMLP(
        weights.column([(f"{layer}.fc1", inner)], config.hidden_size, config.mlp_bias),
        activations[config.activation],
        weights.row(f"{layer}.fc2", inner, config.hidden_size, config.mlp_bias),
    )
    return OptLayer(
        _load_norm(config, weights, f"{layer}.self_attn_layer_norm"),
        weights.attention(config, f"{layer}.self_attn", index, "out_proj"),
        _load_norm(config, weights, f"{layer}.final_layer_norm"),
        mlp,
    )


def _load_norm(config: ModelConfig, weights: Weights, name: str) -> LayerNorm:
    size = config.hidden_size
    return LayerNorm(weights.norm(name, size), weights.tensor(f"{name}.bias", size), config.norm_eps)
