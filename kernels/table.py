"""The kernels by name. A new backend (native code, Triton) is one row here and passes the tests of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..core.errors import Unavailable
from . import cpu, native, reference
from .batch import AttentionSpec, DrawSpec, RowSpan

logger = logging.getLogger("baton.kernels")


class PagedAttention(Protocol):
    """Attention of one step over the paged cache; made once per step, run once per layer."""

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: tuple[Tensor, Tensor] | None) -> Tensor:
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
class Kernels:
    """What a model needs from a device. Shapes and meaning stand at the functions of `reference`.

    attention  from the pool kv[N, L, 2, K, S, D] and the rows of a step
    linear     takes over weight and bias: the caller drops its own, so that no weight is held twice
    """

    attention: Callable[[Tensor, Sequence[RowSpan]], PagedAttention]
    linear: Callable[[Tensor, Tensor | None], Linear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    argmax: Callable[[Tensor], Tensor]
    draw: Callable[[Tensor, Sequence[DrawSpec]], Tensor]


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(
        reference.ReferenceAttention,
        reference.ReferenceLinear,
        reference.rms_norm,
        reference.add_rms_norm,
        reference.argmax,
        reference.draw,
    ),
    "cpu": Kernels(cpu.CpuAttention, cpu.CpuLinear, cpu.rms_norm, cpu.add_rms_norm, reference.argmax, cpu.draw),
}


def make_kernels(name: str, threads: int = 1, deterministic: bool = False) -> Kernels:
    """The kernels of a backend by name, for an executor of `threads` threads.

    name           of a row in `KERNELS`, "native", or "auto": native where it can be had, else cpu
    deterministic  a token's result must not depend on the rows beside it, nor on whether it was prefilled or decoded
    Raises Unavailable when the backend cannot be had here.
    """
    if name not in ("auto", "native"):
        if deterministic and name != "reference":
            raise Unavailable(f"kernels {name!r} are not deterministic: their sums depend on the batch; use native")
        return KERNELS[name]
    try:
        library = native.NativeLibrary(threads, deterministic)
    except Unavailable as error:
        if name == "native" or deterministic:
            raise
        logger.warning("native kernels are not to be had here, the slower kernels of torch serve instead: %s", error)
        return KERNELS["cpu"]
    return Kernels(
        library.attention,
        library.linear,
        library.rms_norm,
        library.add_rms_norm,
        library.argmax,
        library.draw,
    )
