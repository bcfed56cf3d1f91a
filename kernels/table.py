"""The kernels by name. A new backend (native code, Triton) is one row here and passes the tests of the others."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..core.errors import Unavailable
from . import cpu, native, reference, step_twin
from .batch import DrawSpec, RowSpan
from .interface import LayerParts, LayerStack, Linear, PagedAttention
from .triton.step_tensors import StepTensors

logger = logging.getLogger("baton.kernels")


def no_stack(layers: Sequence[LayerParts], eps: float) -> None:
    """For backends that gain nothing by it."""


@dataclass(frozen=True, slots=True)
class StepKernels:
    """Kernels that can be recorded once and replayed for other steps: they ask the host nothing.

    attention  from the pool kv[N, L, 2, K, S, D] and the rows of a step
    sample     logits [R, V] and `draw_words` int32 [NUM_FIELDS, R] -> int64 [R]
    """

    attention: Callable[[Tensor, StepTensors], PagedAttention]
    sample: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model needs from a device. Shapes and meaning stand at the functions of `reference`.

    attention  from the pool kv[N, L, 2, K, S, D] and the rows of a step
    linear     takes over weight and bias: the caller drops its own, so that no weight is held twice
    stack      layers and the eps of all their norms, where the backend runs such layers faster in one go; else None
    norm_heads each query and key head of qkv [T, H + 2K, D] normed alone, in place: from qkv, K, their weights [D] and eps;
               None where it would not be faster than `rms_norm` of the parts
    step       the same work with everything that changes from step to step in tensors, where a backend has that
    """

    attention: Callable[[Tensor, Sequence[RowSpan]], PagedAttention]
    linear: Callable[[Tensor, Tensor | None], Linear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    argmax: Callable[[Tensor], Tensor]
    draw: Callable[[Tensor, Sequence[DrawSpec]], Tensor]
    stack: Callable[[Sequence[LayerParts], float], LayerStack | None] = no_stack
    norm_heads: Callable[[Tensor, int, Tensor, Tensor, float], None] | None = None
    step: StepKernels | None = None


def _twin(
    attention: Callable[[Tensor, Sequence[RowSpan]], PagedAttention], draw: Callable[[Tensor, Sequence[DrawSpec]], Tensor]
) -> StepKernels:
    return StepKernels(partial(step_twin.TwinAttention, attention), partial(step_twin.sample, draw))


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(
        reference.ReferenceAttention,
        reference.ReferenceLinear,
        reference.rms_norm,
        reference.add_rms_norm,
        reference.argmax,
        reference.draw,
        step=_twin(reference.ReferenceAttention, reference.draw),
    ),
    "cpu": Kernels(
        cpu.CpuAttention,
        cpu.CpuLinear,
        cpu.rms_norm,
        cpu.add_rms_norm,
        reference.argmax,
        cpu.draw,
        step=_twin(cpu.CpuAttention, cpu.draw),
    ),
}


def make_kernels(name: str, threads: int = 1, deterministic: bool = False) -> Kernels:
    """The kernels of a backend by name, for an executor of `threads` threads.

    name           of a row in `KERNELS`, "triton" (a GPU's), "native", or "auto": native where it can be had, else cpu
    deterministic  a token's result must not depend on the rows beside it, nor on whether it was prefilled or decoded
    Raises Unavailable when the backend cannot be had here.
    """
    if name not in ("auto", "native"):
        if deterministic and name != "reference":
            raise Unavailable(f"kernels {name!r} are not deterministic: their sums depend on the batch; use native")
        return _triton() if name == "triton" else KERNELS[name]
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
        library.stack,
    )


def _triton() -> Kernels:
    """Imported when asked for: Triton is an extra, and takes a while to import."""
    try:
        backend = importlib.import_module(".triton.backend", __package__)
    except ImportError as error:
        raise Unavailable(f"Triton cannot be imported: {error}; install the extra `gpu`") from error
    made: Kernels = backend.kernels()
    return made
