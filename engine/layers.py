"""Layers that the model families share, and how a rank reads its share of them.

Plain objects that hold tensors: inference needs none of nn.Module's hooks, and small models feel their cost.
Shapes: T tokens, E hidden size, H query heads and K KV heads of this rank, D head dimension, F inner size of
this rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.batch import AttentionSpec
from ..kernels.interface import Linear, PagedAttention
from ..kernels.table import Kernels
from .checkpoint import Checkpoint
from .model.config import ModelConfig
from .parallel import ParallelContext

Map = Callable[[Tensor], Tensor]  # [T, ...] -> [T, ...]


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """y = x W' + b with W's rows (the outputs) sharded: every rank makes its own part of y."""

    linear: Linear  # E -> outputs of this rank

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def gated(self, activation: str, x: Tensor) -> Tensor:
        return self.linear.gated(activation, x)


@dataclass(frozen=True, slots=True)
class RowLinear:
    """y = x W' + b with W's columns (the inputs) sharded: partial results are summed over the ranks.

    linear    inputs of this rank -> E; rank 0 alone adds the bias
    """

    linear: Linear
    parallel: ParallelContext

    def __call__(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.parallel.size == 1 else self.parallel.all_reduce(y)


@dataclass(frozen=True, slots=True)
class Normed:
    """Something whose result is normed."""

    inner: Map
    weight: Tensor  # [E]
    eps: float
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(self.inner(x), self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMSNorm of each query and key head alone."""

    query: Tensor  # [D]
    key: Tensor  # [D]
    eps: float
    kernels: Kernels

    def apply(self, qkv: Tensor, num_kv_heads: int) -> None:
        """Norm the query and key heads of qkv [T, H + 2K, D] in place."""
        if self.kernels.norm_heads is not None:
            self.kernels.norm_heads(qkv, num_kv_heads, self.query, self.key, self.eps)
            return
        heads = qkv.shape[1] - 2 * num_kv_heads
        for part, weight in ((qkv[:, :heads], self.query), (qkv[:, heads : heads + num_kv_heads], self.key)):
            part.copy_(self.kernels.rms_norm(part.reshape(-1, part.shape[2]), weight, self.eps).view(part.shape))


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The attention half of a layer, in two steps: what only a few tokens need of it comes second."""

    qkv: ColumnLinear  # E -> (H + 2K) * D, query heads first, then keys, then values
    output: Map  # H * D -> E
    num_kv_heads: int
    head_dim: int
    norms: HeadNorms | None
    spec: AttentionSpec

    def mix(self, layer: int, x: Tensor, attention: PagedAttention, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [T, E] -> what its heads found [T, H * D]; `output` is still to be applied."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)  # [T, H + 2K, D]
        if self.norms is not None:
            self.norms.apply(qkv, self.num_kv_heads)
        return attention.run(layer, qkv, self.spec, turn)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """SwiGLU, GEGLU: the MLP half of most layers."""

    gate_up: ColumnLinear  # E -> 2F, gate first
    activation: str
    down: RowLinear  # F -> E

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up.gated(self.activation, x))


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of a table that is not the head's weight too (that one has `rows` of its own)."""

    table: Tensor  # [V, E]

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, E]."""
        return functional.embedding(tokens, self.table)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Something whose result is multiplied by a number."""

    inner: Map
    factor: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@dataclass(frozen=True, slots=True)
class Softcapped:
    """Something whose result is bounded to (-cap, cap)."""

    inner: Map
    cap: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x).div_(self.cap).tanh_().mul_(self.cap)


@dataclass(frozen=True, slots=True)
class Weights:
    """Reads this rank's share of a checkpoint into the layers above, each tensor straight to the device where it stays."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    parallel: ParallelContext
    kernels: Kernels
    device: torch.device = torch.device("cpu")

    def empty(self, *shape: int) -> Tensor:
        """Room for a tensor of weights."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A whole tensor."""
        out = self.empty(*shape)
        self.checkpoint.read_into(out, name)
        return out

    def norm(self, name: str, size: int, offset: float = 0.0) -> Tensor:
        """The weight of a norm [size], plus `offset`, added before it is rounded."""
        wide = self.checkpoint.read(f"{name}.weight", (size,), torch.float32)
        return wide.add_(offset).to(self.device, self.dtype)

    def linear(self, name: str, num_outputs: int, num_inputs: int) -> Linear:
        """A projection that every rank has whole."""
        return self.kernels.linear(self.tensor(f"{name}.weight", num_outputs, num_inputs), None)

    def column(self, parts: Sequence[tuple[str, range]], num_inputs: int, bias: bool) -> ColumnLinear:
        """Several projections of one input as a single linear; each part is a name and this rank's range of outputs."""
        total = sum(len(share) for _, share in parts)
        weight = self.empty(total, num_inputs)
        biases = self.empty(total) if bias else None
        begin = 0
        for name, share in parts:
            end = begin + len(share)
            self.checkpoint.read_into(weight[begin:end], f"{name}.weight", share)
            if biases is not None:
                self.checkpoint.read_into(biases[begin:end], f"{name}.bias", share)
            begin = end
        return ColumnLinear(self.kernels.linear(weight, biases))

    def row(self, name: str, share: range, num_outputs: int, bias: bool) -> RowLinear:
        """A projection whose inputs are sharded; `share` is this rank's range of them."""
        weight = self.empty(num_outputs, len(share))
        self.checkpoint.read_into(weight, f"{name}.weight", share, axis=1)
        added = self.tensor(f"{name}.bias", num_outputs) if bias and self.parallel.rank == 0 else None
        return RowLinear(self.kernels.linear(weight, added), self.parallel)

    def attention(self, config: ModelConfig, name: str, layer: int, output: str) -> SelfAttention:
        """The attention half of a layer; `output` is what its last projection is called."""
        heads = self.parallel.share(config.num_heads, "query heads")
        kv_heads = self.parallel.share(config.num_kv_heads, "KV heads")
        queries, keys = _rows_of(heads, config.head_dim), _rows_of(kv_heads, config.head_dim)
        projections = [(f"{name}.q_proj", queries), (f"{name}.k_proj", keys), (f"{name}.v_proj", keys)]
        return SelfAttention(
            qkv=self.column(projections, config.hidden_size, config.qkv_bias),
            output=self.row(f"{name}.{output}", queries, config.hidden_size, config.output_bias),
            num_kv_heads=len(kv_heads),
            head_dim=config.head_dim,
            norms=self._head_norms(config, name) if config.head_norms else None,
            spec=attention_spec(config, layer),
        )

    def _head_norms(self, config: ModelConfig, name: str) -> HeadNorms:
        query, key = (self.norm(f"{name}.{which}_norm", config.head_dim, config.norm_offset) for which in "qk")
        return HeadNorms(query, key, config.norm_eps, self.kernels)


def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
    """How one layer attends."""
    window = config.windows[layer] if config.windows else None
    return AttentionSpec(config.attention_scale, window, config.attention_softcap)


def _rows_of(heads: range, head_dim: int) -> range:
    """The rows of a projection that belong to a range of heads."""
    return range(heads.start * head_dim, heads.stop * head_dim)
