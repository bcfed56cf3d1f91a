"""The attention of a step on a GPU: turn and store, then one launch for its decode rows and one for all the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import InternalError
from ..batch import AttentionSpec, RowSpan
from ..interface import Turn
from .decode_attention import decode_attention
from .kv_write import turn_and_store
from .prefill_attention import prefill_attention
from .step_tensors import StepTensors, part_aim, upload
from .tiles import SMALLEST_DOT

LARGEST_HEAD = 256
INTERPRETED_PROCESSORS = 4  # what stands for the device's size where kernels are interpreted


class TritonAttention:
    """See `interface.PagedAttention`. Nothing behind a row's last token is ever read, so no tail has to be cleared."""

    def __init__(self, kv: Tensor, step: StepTensors, scales: Tensor | None = None) -> None:
        """Over tensors on the device of kv[N, L, 2, K, S, D], which may be written anew between runs of a CUDA graph.

        scales  float32 [L, 2, K], what stored keys and values are to be multiplied by; None when the cache holds them as
                they are
        """
        num_layers, kv_heads, block_size = kv.shape[1], *kv.shape[3:5]
        if block_size % SMALLEST_DOT:
            raise InternalError(f"the kernels need blocks of a multiple of {SMALLEST_DOT} tokens, got {block_size}")
        if kv.shape[5] > LARGEST_HEAD:
            raise InternalError(f"the kernels take heads of up to {LARGEST_HEAD} dimensions, got {kv.shape[5]}")
        if kv.stride(5) != 1:
            raise InternalError(f"the numbers of a head must be contiguous in the cache, got strides {kv.stride()}")
        if scales is not None and (scales.shape != (num_layers, 2, kv_heads) or scales.dtype != torch.float32):
            raise InternalError(f"scales must be float32 [{num_layers}, 2, {kv_heads}], got {scales.dtype} {list(scales.shape)}")
        self._kv = kv
        self._step = step
        self._scales = scales

    def run(self, layer: int, qkv: Tensor, spec: AttentionSpec, turn: Turn | None) -> Tensor:
        """qkv [T, H + 2K, D] contiguous, turn cos and sin [T, D / 2] or None; returns [T, H * D]."""
        step, pool = self._step, self._kv.select(1, layer)  # [N, 2, K, S, D]
        scales = None if self._scales is None else self._scales[layer]
        if qkv.shape[0] != step.sizes.num_tokens or not qkv.is_contiguous():
            raise InternalError(f"qkv must be contiguous and of {step.sizes.num_tokens} tokens, got {list(qkv.shape)}")
        out = qkv.new_empty((qkv.shape[0], (qkv.shape[1] - 2 * pool.shape[2]) * pool.shape[4]))
        turn_and_store(qkv, pool, scales, step.slots, turn)
        if step.sizes.num_decode:
            decode_attention(qkv, pool, scales, step, spec, out)
        if step.sizes.num_prefill:
            prefill_attention(qkv, pool, scales, step, spec, out)
        return out


def attention_of_rows(kv: Tensor, rows: Sequence[RowSpan], scales: Tensor | None = None) -> TritonAttention:
    """For a step that runs once; see `TritonAttention`."""
    return TritonAttention(kv, upload(rows, kv.shape[4], device_aim(kv), kv.device), scales)


def device_aim(kv: Tensor) -> int:
    """`step_tensors.part_aim` of the device that holds kv[N, L, 2, K, S, D]."""
    processors = INTERPRETED_PROCESSORS
    if kv.device.type == "cuda":
        processors = torch.cuda.get_device_properties(kv.device).multi_processor_count
    return part_aim(kv.shape[3], processors)
