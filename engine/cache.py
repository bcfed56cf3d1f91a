"""The paged KV cache as a tensor over memory that somebody else owns (`kv_transfer.pool.PoolMemory`).

The memory must outlive the tensor: close the executor and drop the tensor before closing the pool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InternalError
from ..core.kv import KVLayout
from .loader import torch_dtype
from .model_config import ModelConfig
from .parallel import ParallelContext


def kv_layout(config: ModelConfig, block_size: int, dtype: str, parallel: ParallelContext = ParallelContext()) -> KVLayout:
    """Geometry of this rank's pool. Raises ModelError when the heads cannot be split over the ranks."""
    torch_dtype(dtype)
    layers = parallel.stage(config.num_layers)
    heads = parallel.share(config.num_kv_heads, "KV heads")
    return KVLayout(len(layers), len(heads), config.head_dim, block_size, dtype, layers.start, heads.start)


def kv_tensor(buffer: memoryview | bytearray, layout: KVLayout, num_blocks: int) -> Tensor:
    """kv[block, layer, 2, kv_head, slot, dim] over the first bytes of a writable buffer; nothing is copied."""
    needed = num_blocks * layout.block_bytes
    size = memoryview(buffer).nbytes
    if num_blocks < 1 or size < needed:
        raise InternalError(f"a pool of {num_blocks} blocks needs at least {max(needed, layout.block_bytes)} bytes, got {size}")
    flat = torch.frombuffer(buffer, dtype=torch_dtype(layout.dtype), count=needed // layout.item_bytes)
    return flat.view(num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
