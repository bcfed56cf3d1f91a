"""Which tiles the attention kernels work in: chosen by head size, type and device once, never searched for while serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import AttentionSpec


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is compiled.

    rows  M, query vectors of a program
    tile  C, positions that are attended to at once
    """

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told. Multiply-adds may be fused, which it will not always do by itself."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# By padded head size; `benchmarks/gpu/compiled.py` says what the compiler makes of each. Prefill on Hopper: two warp groups
# of 64 rows each share a tile, as wgmma wants it, within 227 KiB of shared memory and 255 registers a thread.
_HOPPER_PREFILL = {64: Launch(128, 128, 8, 3), 128: Launch(128, 128, 8, 3), 256: Launch(128, 32, 8, 4)}
# The same where windows and soft caps, or the unpacking of 8-bit caches, need registers of their own.
_HOPPER_WINDOW_PREFILL = {64: Launch(128, 128, 8, 3), 128: Launch(128, 64, 8, 5), 256: Launch(128, 32, 8, 4)}
_HOPPER_UNPACKING_PREFILL = {64: Launch(128, 128, 8, 3), 128: Launch(128, 64, 8, 5), 256: Launch(64, 32, 8, 3)}
# Ada, Ampere and whatever is not known: products from registers, 99 KiB of shared memory.
_SMALLER_PREFILL = {64: Launch(128, 64, 8, 3), 128: Launch(128, 32, 8, 3), 256: Launch(64, 32, 8, 3)}
# Decode is bound by memory: two tiles, 64 KiB of keys and values, on their way for each of up to three programs on a processor.
# (Addresses come from block tables, and Triton gives the loads of those tables half of the stages.)
_DECODE = {64: Launch(16, 128, 4, 5), 128: Launch(16, 64, 4, 5), 256: Launch(16, 32, 4, 5)}
# float32 has no tensor cores that keep its precision: correct, and not meant to be fast.
_FLOAT32 = {64: Launch(32, 32, 4, 1), 128: Launch(16, 32, 4, 1), 256: Launch(16, 16, 4, 1)}
_INTERPRETED = Launch(16, 16, 1, 1)


def prefill_launch(qkv: Tensor, pool: Tensor, spec: AttentionSpec) -> Launch:
    """For queries qkv [T, H + 2K, D] and a layer of the cache [N, 2, K, S, D] on their device."""
    if capability(qkv.device) < (9, 0):
        return _launch(qkv, _SMALLER_PREFILL)
    if pool.element_size() < qkv.element_size():
        return _launch(qkv, _HOPPER_UNPACKING_PREFILL)
    return _launch(qkv, _HOPPER_PREFILL if spec.window is None and spec.softcap is None else _HOPPER_WINDOW_PREFILL)


def decode_launch(qkv: Tensor) -> Launch:
    """For queries qkv [T, H + 2K, D] on their device; its rows are the fewest that a product can have."""
    return _launch(qkv, _DECODE)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; (0, 0) where kernels are interpreted."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _launch(qkv: Tensor, table: Mapping[int, Launch]) -> Launch:
    if capability(qkv.device) == (0, 0):
        return _INTERPRETED
    if qkv.dtype == torch.float32:
        table = _FLOAT32
    return next(launch for size, launch in table.items() if qkv.shape[2] <= size)
