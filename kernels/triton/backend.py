"""Everything a model needs of a GPU, as one row of `kernels.table`. Imported only where that row is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from .. import table
from . import gates, norms, sampling
from .attention import TritonAttention, attention_of_rows


@dataclass(frozen=True, slots=True)
class GpuLinear:
    """See `interface.Linear`: the products are the device's library's, the gate is fused with what follows it."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def gated(self, activation: str, x: Tensor) -> Tensor:
        return gates.gated(activation, self(x))

    def rows(self, index: Tensor) -> Tensor:
        return functional.embedding(index, self.weight)


def kernels() -> table.Kernels:
    """The row."""
    return table.Kernels(
        attention=attention_of_rows,
        linear=GpuLinear,
        rms_norm=norms.rms_norm,
        add_rms_norm=norms.add_rms_norm,
        argmax=sampling.argmax,
        draw=sampling.draw,
        norm_heads=norms.norm_heads,
        step=table.StepKernels(TritonAttention, sampling.sample),
    )
