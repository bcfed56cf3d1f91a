"""How much of a device's peak numbers its kernels reach: fitted from published measurements wherever there are any.

    python benchmarks/fit_efficiency.py --data DIR

prints these numbers, what they were fitted to, and the error on rows that were not used (see "Silicon" in docs/fidelity.md).
Kernels of A100 and H100 are from aiconfigurator's tables, of A40 (and the rest of a layer) from vidur's; host seconds are those
of vLLM in whole measured runs. `default` is the mean of the three families, for devices without measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a peak that are reached, and seconds that no peak explains.

    gemm_flops, gemm_flops_8, gemm_bytes   of large products' FLOP/s with weights of 16 and of 8 bits, and of bandwidth when
                     weights are streamed
    gemm_launch      seconds of a product beyond both
    attention_flops  of FLOP/s over the pairs of a prompt
    attention_bytes  of bandwidth over the KV that decode rows read
    attention_launch seconds of one layer's attention beyond both
    reduce_bytes     of a link's rate in an all-reduce
    reduce_launch    seconds of an all-reduce beyond its bytes; `reduce_rank` more per rank
    layer            seconds per layer beyond its kernels: norms, rotary positions, gaps
    layer_passes     times that a token's hidden state is read or written in a layer beside the products
    step, row        seconds of host work per step, and per row of it
    """

    gemm_flops: float
    gemm_flops_8: float
    gemm_bytes: float
    gemm_launch: float
    attention_flops: float
    attention_bytes: float
    attention_launch: float
    reduce_bytes: float
    reduce_launch: float
    reduce_rank: float
    layer: float
    layer_passes: float
    step: float
    row: float


_H100 = Efficiency(
    gemm_flops=0.802,
    gemm_flops_8=0.415,
    gemm_bytes=0.84,
    gemm_launch=3.92e-6,
    attention_flops=0.451,
    attention_bytes=0.815,
    attention_launch=1.24e-5,
    reduce_bytes=0.651,
    reduce_launch=3.59e-6,
    reduce_rank=4.37e-7,
    layer=4e-6,
    layer_passes=18.1,
    step=1.9e-3,
    row=4e-5,
)
_A100 = replace(
    _H100,
    gemm_flops=0.744,
    gemm_bytes=0.717,
    gemm_launch=6.01e-6,
    attention_flops=0.473,
    attention_bytes=0.686,
    attention_launch=1.86e-5,
    reduce_bytes=0.599,
    reduce_launch=3.5e-6,
    reduce_rank=8.05e-7,
    layer_passes=20.7,
)
_A40 = replace(_A100, gemm_flops=0.731, gemm_bytes=0.777, gemm_launch=1.32e-5, layer_passes=14.6)
_DEFAULT = replace(
    _A100, gemm_flops=0.76, gemm_bytes=0.78, gemm_launch=6e-6, attention_bytes=0.74, attention_launch=1.5e-5, layer_passes=18.0
)
# One core, from the 110M figures of benchmarks/NOTES.md: no framework is launched, but every row costs.
_CPU = replace(
    _DEFAULT,
    gemm_flops=0.75,
    gemm_bytes=0.9,
    attention_flops=0.3,
    attention_bytes=0.4,
    reduce_launch=1e-4,
    layer_passes=6.0,
    step=5e-4,
    row=5e-5,
)

EFFICIENCIES = {"default": _DEFAULT, "a100": _A100, "h100": _H100, "a40": _A40, "cpu": _CPU}
"""By `Accelerator.family`; "default" for those without measurements."""


def efficiency_of(family: str) -> Efficiency:
    """The family's own, or the default."""
    return EFFICIENCIES.get(family, EFFICIENCIES["default"])
