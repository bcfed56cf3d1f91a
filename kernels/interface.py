"""What a backend's objects can do, whatever device they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .batch import AttentionSpec

Turn = tuple[Tensor, Tensor]  # cos and sin [T, D / 2] of the tokens' positions


class PagedAttention(Protocol):
    """Attention of one step over the paged cache; made once per step, run once per layer."""

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: Turn | None) -> Tensor:
        """Rotate, store the new keys and values of `layer`, then attend.

        qkv [T, H + 2K, D], query, key and value heads of every packed token, may be overwritten; turn is cos and
        sin [T, D / 2] of the tokens' positions, None for models without rotary positions. Returns [T, H * D].
        """
        ...


class Linear(Protocol):
    """A weight in whatever order suits the device. Made from weight [outputs, inputs] and bias [outputs] or None."""

    def __call__(self, x: Tensor) -> Tensor:
        """y = x W' + b: [T, inputs] -> [T, outputs]."""
        ...

    def gated(self, activation: str, x: Tensor) -> Tensor:
        """activation(first half of y) * second half: [T, inputs] -> [T, outputs / 2]; one of `reference.GATES`."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, for a head that is also the embedding: index int64 [T] -> [T, inputs]."""
        ...


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One decoder layer that is attention and a gated MLP, each behind an RMSNorm, and nothing else.

    qkv, output      E -> (H + 2K) * D and H * D -> E
    head_dim         D
    head_norms       weights [D] of the norms of each query and each key head, None without
    turn             which of the model's rotary tables turns its queries and keys
    gate_up, down    E -> 2F, gate first, and F -> E
    mlp_norm         weight [E]
    next_norm        weight [E] of the norm that what follows this layer begins with
    """

    qkv: Linear
    output: Linear
    head_dim: int
    head_norms: tuple[Tensor, Tensor] | None
    spec: AttentionSpec
    turn: int
    mlp_norm: Tensor
    gate_up: Linear
    activation: str
    down: Linear
    next_norm: Tensor


class LayerStack(Protocol):
    """Layers from the first on, run in one go."""

    def run(self, x: Tensor, normed: Tensor, attention: PagedAttention, turns: Sequence[Turn | None]) -> None:
        """x [T, E] and its norm by the first layer's attention norm become those behind the last of the layers, in place."""
        ...
