"""The kernels by name. A new backend (native code, Triton) is one row here and passes the tests of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from . import cpu, reference
from .batch import RowSpan


class PagedAttention(Protocol):
    """Attention of one step over the paged cache; made once per step, run once per layer."""

    def run(self, layer: int, qkv: Tensor) -> Tensor:
        """Store the new keys and values of `layer`, then attend: [T, H + 2K, D] rotated -> [T, H * D]."""
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model needs from a device. Shapes and meaning stand at the functions of `reference`.

    attention  from the pool kv[N, L, 2, K, S, D] and the rows of a step
    """

    attention: Callable[[Tensor, Sequence[RowSpan]], PagedAttention]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_mul: Callable[[Tensor], Tensor]


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(reference.ReferenceAttention, reference.rms_norm, reference.rotary, reference.silu_mul),
    "cpu": Kernels(cpu.CpuAttention, cpu.rms_norm, cpu.rotary, cpu.silu_mul),
}
