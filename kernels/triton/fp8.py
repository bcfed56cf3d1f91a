"""Weights of 8 bits: float8_e4m3fn with one scale for each output, multiplied with activations as the device does it best.

Where the device multiplies 8-bit numbers (compute capability 8.9 and later) activations are brought to 8 bits too, with one
scale for each token, and `torch._scaled_mm` multiplies. Elsewhere, and for shapes or types that it does not take, a
kernel widens the weights on their way to the multiplication, and activations stay what they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError
from ..reference import FP8_MAX
from .gates import gated

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_TILE = 8192  # of a row that is brought to 8 bits, in registers


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, C] with contiguous rows -> float8_e4m3fn [R, C] and float32 [R], the scale of each row.

    A row's largest magnitude becomes 448, the largest number of 8 bits; a row of zeros has scale 1.
    """
    if x.dim() != 2 or x.dtype not in FLOATS or x.stride(1) != 1:
        raise InternalError(
            f"rows of floats [R, C] can be brought to 8 bits, not {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if out.numel():
        tile = min(MAX_TILE, triton.next_power_of_2(x.shape[1]))
        quantize_kernel[(len(x),)](x, out, scales, x.shape[1], x.stride(0), tile, num_warps=max(1, min(16, tile // 512)))
    return out, scales


def kv_scales(kv: Tensor) -> Tensor:
    """Scales for a cache of 8 bits from keys and values seen in a wider one: kv[n, L, 2, K, S, D] -> float32 [L, 2, K].

    A stored number times its head's scale is what it stands for; the largest magnitude seen becomes half of what 8 bits
    can hold, so that twice as much still fits, and costs none of a float's precision.
    """
    if kv.dim() != 6 or kv.shape[2] != 2 or kv.dtype not in FLOATS or not len(kv):
        raise InternalError(
            f"scales are taken of blocks of a pool of floats [n, L, 2, K, S, D], not of {kv.dtype} {list(kv.shape)}"
        )
    largest = kv.abs().amax(dim=(0, 4, 5)).float()  # [L, 2, K]
    return torch.where(largest > 0, largest / (FP8_MAX / 2), 1.0)


class Fp8Linear:
    """y = x W' + b with W in 8 bits, for x of the type that the weight came in; see `interface.Linear`.

    multiplied_in_8_bits  whether activations are brought to 8 bits too; None asks the device
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, multiplied_in_8_bits: bool | None = None) -> None:
        """weight [outputs, inputs] and bias [outputs] are taken over: the caller drops its own."""
        if weight.dim() != 2 or weight.dtype not in FLOATS or not weight.numel():
            raise InternalError(
                f"a weight [outputs, inputs] of floats can be brought to 8 bits, not {weight.dtype} {list(weight.shape)}"
            )
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise InternalError(f"a bias must be {weight.dtype} [{weight.shape[0]}], not {bias.dtype} {list(bias.shape)}")
        self._dtype = weight.dtype
        self._weight, self._scales = quantize_rows(weight.contiguous())  # [outputs, inputs], [outputs]
        self._bias = bias
        takes = weight.dtype == torch.bfloat16 and all(size % 16 == 0 for size in weight.shape)
        if multiplied_in_8_bits and not takes:
            raise InternalError(
                "only bfloat16 weights whose sides are multiples of 16 are multiplied in 8 bits, "
                f"not {weight.dtype} {list(weight.shape)}"
            )
        self._in_8_bits = takes and _multiplies_8_bits(weight.device) if multiplied_in_8_bits is None else multiplied_in_8_bits

    def __call__(self, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs]."""
        outputs, inputs = self._weight.shape
        if x.dim() != 2 or x.shape[1] != inputs or x.dtype != self._dtype:
            raise InternalError(f"a linear of {inputs} {self._dtype} inputs was given {x.dtype} {list(x.shape)}")
        if not len(x):
            return x.new_empty((0, outputs))
        if not self._in_8_bits:
            return _widening_product(x, self._weight, self._scales, self._bias)
        narrow, scales = quantize_rows(x)
        return torch._scaled_mm(
            narrow,
            self._weight.t(),
            scale_a=scales[:, None],
            scale_b=self._scales[None, :],
            bias=self._bias,
            out_dtype=self._dtype,
            use_fast_accum=True,
        )

    def gated(self, activation: str, x: Tensor) -> Tensor:
        """[T, inputs] -> [T, outputs / 2]."""
        return gated(activation, self(x))

    def rows(self, index: Tensor) -> Tensor:
        """int64 [T] -> [T, inputs], widened."""
        picked = self._weight.view(torch.uint8)[index].view(torch.float8_e4m3fn)
        return (picked.float() * self._scales[index][:, None]).to(self._dtype)


def _multiplies_8_bits(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _widening_product(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, I] times float8_e4m3fn weight [O, I] with scales [O] -> [T, O]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    tokens, (outputs, inputs) = len(x), weight.shape
    out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    # Few tokens: the weights are what is read, so many small tiles of them fill the device.
    rows, columns, depth, warps = (16, 32, 128, 4) if tokens <= 16 else (64, 64, 128, 4) if tokens <= 128 else (128, 128, 64, 8)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(outputs, columns))
    product_kernel[grid](
        x, weight.view(torch.uint8), scales, bias, out, tokens, outputs, inputs, x.stride(0), rows, columns, depth,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    return out


@triton.jit
def quantize_kernel(x: tl.tensor, out: tl.tensor, scales: tl.tensor, size: int, stride: int, tile: tl.constexpr) -> None:
    """One row of x [R, size], rows `stride` apart; it is read twice where it does not fit in a tile."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([tile], dtype=tl.float32)
    for at in range(0, size, tile):
        place = at + tl.arange(0, tile)
        most = tl.maximum(most, tl.abs(tl.load(x + row * stride + place, mask=place < size, other=0.0).to(tl.float32)))
    largest = tl.max(most, axis=0)
    scale = tl.where(largest > 0.0, largest / 448.0, 1.0)
    for at in range(0, size, tile):
        place = at + tl.arange(0, tile)
        values = tl.load(x + row * stride + place, mask=place < size, other=0.0).to(tl.float32) / scale
        # A rounded quotient may lie above the range by its last bit.
        narrow = tl.minimum(tl.maximum(values, -448.0), 448.0).to(tl.float8e4nv)
        tl.store(out + row * size + place, narrow, mask=place < size)
    tl.store(scales + row, scale)


@triton.jit
def product_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    bias: tl.tensor | None,
    out: tl.tensor,
    num_tokens: int,
    num_outputs: int,
    num_inputs: int,
    x_stride: int,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """A tile of out [T, O] = x [T, I] times the bytes of weight [O, I].

    The bits of an 8-bit number are those of a float16 that is 256 times smaller, subnormal ones too; so every device can
    read them, and the factor goes into the scale.
    """
    token = tl.program_id(0) * rows + tl.arange(0, rows)
    output = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros([rows, columns], dtype=tl.float32)
    for at in range(0, num_inputs, depth):
        inner = at + tl.arange(0, depth)
        left = tl.load(
            x + token.to(tl.int64)[:, None] * x_stride + inner[None, :],
            mask=(token < num_tokens)[:, None] & (inner < num_inputs)[None, :],
            other=0.0,
        )
        bits = tl.load(
            weight + output.to(tl.int64)[None, :] * num_inputs + inner[:, None],
            mask=(output < num_outputs)[None, :] & (inner < num_inputs)[:, None],
            other=0,
        ).to(tl.int16)
        right = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(left.dtype)
        total = tl.dot(left, right, total, input_precision="ieee")
    scale = tl.load(scales + output, mask=output < num_outputs, other=0.0) * 256.0
    total *= scale[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=output < num_outputs, other=0.0).to(tl.float32)[None, :]
    place = out + token.to(tl.int64)[:, None] * num_outputs + output[None, :]
    inside = (token < num_tokens)[:, None] & (output < num_outputs)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
