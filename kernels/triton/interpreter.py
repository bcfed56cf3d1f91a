"""Triton's interpreter rounds as a device does, so that kernels are proved to the last bit without one.

Triton runs kernels in numpy when TRITON_INTERPRET is set before they are defined. It cuts float32 to bfloat16, and
loses the carry where an 8-bit significand overflows; devices round to the nearest, ties to even. And it multiplies matrices
of bfloat16 by their bits, as if they were integers. Call `mend` once in a process that interprets: tests do, and benchmarks
asked to `--interpret`. (The interpreter of Triton 3.6 needs numpy before 2.4.)
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import triton.language as tl
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
    """Conversions between types of numbers are torch's from now on, and products of bfloat16 are those of numbers."""
    interpreter._convert_float = _converted
    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def multiply_wide(self: object, left: _Handle, right: _Handle, *others: object) -> object:
        return multiply(self, _widened(left), _widened(right), *others)

    if multiply.__name__ != multiply_wide.__name__:  # not mended before
        builder.create_dot = multiply_wide


def _converted(values: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
    """The bits of `values`, numbers of Triton's type `source` or their bits, as numbers of its type `target`."""
    from_type, to_type = _TYPES[str(source)], _TYPES[str(target)]
    bits = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy())
    made = bits.view(from_type).to(to_type).view(torch.uint8).numpy()
    return made.view(f"uint{8 * to_type.itemsize}").reshape(values.shape)


class _Handle(Protocol):
    """What the interpreter holds of a block of numbers: numpy's, of Triton's type."""

    data: np.ndarray
    dtype: object


def _widened(operand: _Handle) -> _Handle:
    """Numbers of bfloat16, which numpy has not, as float32."""
    if str(operand.dtype) != "bf16":
        return operand
    bits = torch.from_numpy(np.ascontiguousarray(operand.data).view(np.int16))
    wide: _Handle = interpreter.TensorHandle(bits.view(torch.bfloat16).float().numpy(), tl.float32)
    return wide
