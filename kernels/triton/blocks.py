"""Blocks of KV for a transfer: scattered ones packed into one contiguous staging buffer, and back, converted on the way.

The pool is kv[N, L, 2, K, S, D]; staged are some of its blocks, layers and heads: [n, l, 2, k, S, D], contiguous. What one
block keeps of one layer, keys or values, of neighbouring heads, is one run in both. A program moves one piece of a run,
16 bytes at a time, so that how the blocks are scattered costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.errors import InternalError

TILE_BYTES = 16384  # of a program, as the wider of the two types has them: four loads in flight for each of 256 threads
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class PoolCut:
    """What of a pool is moved.

    kv      the pool [N, L, 2, K, S, D]
    layers  of L
    heads   of K
    scales  float32 [L, 2, K] on the pool's device: a number of 8 bits times its scale is what it stands for, in the pool
            and in staging alike. None where both sides are of 8 bits, or neither
    """

    kv: Tensor
    layers: range
    heads: range
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kv.dim() != 6 or self.kv.shape[2] != 2 or self.kv.dtype not in FLOATS:
            raise InternalError(
                f"a pool is kv[N, L, 2, K, S, D] of floats of 8 to 32 bits, not {self.kv.dtype} {list(self.kv.shape)}"
            )
        slots, size = self.kv.shape[4:]
        if self.kv.stride()[3:] != (slots * size, size, 1):
            raise InternalError(
                f"heads of a block must be contiguous: strides {self.kv.stride()} of a pool {list(self.kv.shape)} are not"
            )
        for name, cut, whole in (("layers", self.layers, self.kv.shape[1]), ("heads", self.heads, self.kv.shape[3])):
            if cut.step != 1 or not 0 <= cut.start < cut.stop <= whole:
                raise InternalError(f"{name} {cut} are no range within the pool's {whole}")
        expected = (self.kv.shape[1], 2, self.kv.shape[3])
        if self.scales is not None and (
            self.scales.shape != expected or self.scales.dtype != torch.float32 or not self.scales.is_contiguous()
        ):
            raise InternalError(f"scales must be float32 {list(expected)}, not {self.scales.dtype} {list(self.scales.shape)}")

    @classmethod
    def whole(cls, kv: Tensor, scales: Tensor | None = None) -> PoolCut:
        """All layers and heads."""
        return cls(kv, range(kv.shape[1]), range(kv.shape[3]), scales)

    def staged_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Of the staging buffer for so many blocks."""
        slots, size = self.kv.shape[4:]
        return num_blocks, len(self.layers), 2, len(self.heads), slots, size

    def index(self, blocks: Sequence[int]) -> Tensor:
        """Block ids for `gather` and `scatter`: int32 [n] on the pool's device. Raises InternalError for ids of no block."""
        wrong = [block for block in blocks if not 0 <= block < self.kv.shape[0]]
        if wrong:
            raise InternalError(f"blocks {wrong[:8]} are not among the {self.kv.shape[0]} of the pool")
        return torch.tensor(blocks, dtype=torch.int32).to(self.kv.device, non_blocking=True)

    def gather(self, blocks: Tensor, staged: Tensor) -> None:
        """The blocks of `index` into staged[n, l, 2, k, S, D], in their order."""
        self._move(blocks, staged, False)

    def scatter(self, blocks: Tensor, staged: Tensor) -> None:
        """staged[n, l, 2, k, S, D] into the blocks of `index`, each of which is there once."""
        self._move(blocks, staged, True)

    def _move(self, blocks: Tensor, staged: Tensor, scatter: bool) -> None:
        shape = self.staged_shape(len(blocks))
        if staged.shape != shape or not staged.is_contiguous() or staged.dtype not in FLOATS:
            raise InternalError(
                f"staging for {len(blocks)} blocks is contiguous {list(shape)}, not {staged.dtype} {list(staged.shape)}"
            )
        num_eights = (self.kv.dtype == torch.float8_e4m3fn) + (staged.dtype == torch.float8_e4m3fn)
        if num_eights == 1 and self.scales is None:
            raise InternalError(f"a pool of {self.kv.dtype} and staging of {staged.dtype} need scales")
        run = shape[3] * shape[4] * shape[5]
        widest = max(self.kv.element_size(), staged.element_size())
        tile = min(TILE_BYTES // widest, triton.next_power_of_2(run))
        grid = (shape[0] * shape[1] * 2, triton.cdiv(run, tile))
        if grid[0]:
            move_kernel[grid](
                self.kv, staged, blocks, self.scales, *self.kv.stride()[:3], self.layers.start, shape[1], self.heads.start,
                self.kv.shape[3], run, shape[4] * shape[5], num_eights == 1, scatter, tile,
                num_warps=max(1, min(8, tile * widest // 2048)),
            )  # fmt: skip


@triton.jit
def move_kernel(
    kv: tl.tensor,
    staged: tl.tensor,
    blocks: tl.tensor,
    scales: tl.tensor | None,
    block_stride: int,
    layer_stride: int,
    part_stride: int,
    first_layer: int,
    num_layers: int,
    first_head: int,
    num_kv_heads: int,
    run: tl.constexpr,
    head_size: tl.constexpr,
    scaled: tl.constexpr,
    scatter: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """A piece of run number program_id(0), counted over blocks, layers, and keys before values.

    run, head_size  elements of a run and of one head of it
    scaled          whether one side, not both, has 8 bits
    """
    number = tl.program_id(0)
    layer = first_layer + number // 2 % num_layers
    block = tl.load(blocks + number // 2 // num_layers).to(tl.int64)
    offset = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = offset < run
    pooled = kv + block * block_stride + layer.to(tl.int64) * layer_stride + number % 2 * part_stride
    pooled += first_head * head_size + offset
    packed = staged + number.to(tl.int64) * run + offset
    source, target = (packed, pooled) if scatter else (pooled, packed)
    x = tl.load(source, mask=inside)
    if scaled:
        head = (layer * 2 + number % 2) * num_kv_heads + first_head + offset // head_size
        scale = tl.load(scales + head, mask=inside, other=1.0)
        if target.dtype.element_ty == tl.float8e4nv:
            x = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -448.0), 448.0)
        else:
            x = x.to(tl.float32) * scale
    tl.store(target, x.to(target.dtype.element_ty), mask=inside)
