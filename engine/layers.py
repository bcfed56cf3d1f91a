"""Layers that the model families share: linears sharded over tensor-parallel ranks, and rotary tables.

Plain objects that hold tensors: inference needs none of nn.Module's hooks, and small models feel their cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.table import Kernels, Linear
from .checkpoint import Checkpoint
from .model_config import ModelConfig, RopeConfig
from .parallel import ParallelContext


@dataclass(frozen=True, slots=True)
class ColumnLinear:
    """y = x W' + b with W's rows (the outputs) sharded: every rank makes its own part of y."""

    linear: Linear  # E -> outputs of this rank

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)


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


def load_column(
    checkpoint: Checkpoint, parts: Sequence[tuple[str, range]], num_inputs: int, bias: bool, dtype: torch.dtype, kernels: Kernels
) -> ColumnLinear:
    """Several projections of one input as a single linear; each part is a name and this rank's range of outputs."""
    total = sum(len(share) for _, share in parts)
    weight = torch.empty((total, num_inputs), dtype=dtype)
    biases = torch.empty(total, dtype=dtype) if bias else None
    begin = 0
    for name, share in parts:
        end = begin + len(share)
        checkpoint.read_into(weight[begin:end], f"{name}.weight", share)
        if biases is not None:
            checkpoint.read_into(biases[begin:end], f"{name}.bias", share)
        begin = end
    return ColumnLinear(kernels.linear(weight, biases))


def load_row(
    checkpoint: Checkpoint,
    name: str,
    share: range,
    num_outputs: int,
    bias: bool,
    dtype: torch.dtype,
    kernels: Kernels,
    parallel: ParallelContext,
) -> RowLinear:
    """A projection whose inputs are sharded; `share` is this rank's range of them."""
    weight = torch.empty((num_outputs, len(share)), dtype=dtype)
    checkpoint.read_into(weight, f"{name}.weight", share, axis=1)
    added = checkpoint.read(f"{name}.bias", (num_outputs,), dtype) if bias and parallel.rank == 0 else None
    return RowLinear(kernels.linear(weight, added), parallel)


def scaled_range(heads: range, head_dim: int) -> range:
    """The rows of a projection that belong to a range of heads."""
    return range(heads.start * head_dim, heads.stop * head_dim)


def rotary_tables(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [num_positions, head_dim / 2]: computed in float32, then cast, as transformers does."""
    frequencies = inverse_frequencies(config.rope, config.head_dim)  # [head_dim / 2]
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies  # [P, head_dim / 2]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position [head_dim / 2], float32, after the scaling of long-context models."""
    frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), blended, scaled)
