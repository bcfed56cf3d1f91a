"""Triton's interpreter rounds as a device does, so that kernels are proved to the last bit without one.

Triton runs kernels in numpy when TRITON_INTERPRET is set before they are defined. It cuts float32 to bfloat16, and
loses the carry where an 8-bit significand overflows; devices round to the nearest, ties to even. Call `mend` once in a
process that interprets: tests do, and benchmarks asked to `--interpret`.
"""

from __future__ import annotations

import numpy as np
import torch
from triton.runtime import interpreter

_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}  # by Triton's names


def mend() -> None:
    """Conversions between types of numbers are torch's from now on."""
    interpreter._convert_float = _converted


def _converted(values: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
    """The bits of `values`, numbers of Triton's type `source` or their bits, as numbers of its type `target`."""
    from_type, to_type = _TYPES[str(source)], _TYPES[str(target)]
    bits = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy())
    made = bits.view(from_type).to(to_type).view(torch.uint8).numpy()
    return made.view(f"uint{8 * to_type.itemsize}").reshape(values.shape)
