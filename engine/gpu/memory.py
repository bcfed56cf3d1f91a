"""How much of a GPU's memory is left for KV: what a worker may fill, less its weights and what its steps need on the way."""

from __future__ import annotations

from collections.abc import Callable

from ...core.errors import ModelError
from ...core.kv import KVLayout
from ...kernels.device import Device, DeviceMemory

# Bytes that are not torch's to count: the CUDA context, the modules of kernels, cuBLAS, and the graphs themselves.
OVERHEAD_BYTES = 1 << 30


def kv_budget(memory: DeviceMemory, share: float, workspace: int) -> int:
    """Bytes for the KV pool of a worker that may fill `share` of its GPU; 0 when nothing is left.

    memory     now, with the weights on the device
    workspace  bytes that the largest steps took beyond them
    """
    own = share * memory.total - memory.held  # what may still be allocated of the worker's share
    return max(0, int(min(own, memory.free) - workspace - OVERHEAD_BYTES))


def measured_workspace(device: Device, run: Callable[[], int]) -> int:
    """Bytes that `run` took at the most and gave back; it returns how many more it took for what is not counted."""
    before = device.memory().held
    device.reset_peak()
    uncounted = run()
    peak = device.memory().peak
    device.release()
    return max(0, peak - before - uncounted)


def blocks_in(num_bytes: int, layout: KVLayout, max_model_len: int, where: str) -> int:
    """Blocks of a pool of `num_bytes`. Raises ModelError, beginning with `where`, when they don't hold one whole sequence."""
    num_blocks, needed = num_bytes // layout.block_bytes, layout.num_blocks_for(max_model_len) + 1
    if num_blocks < needed:
        raise ModelError(
            f"{where}: {num_bytes} bytes hold {num_blocks} blocks of {layout.block_bytes} bytes; "
            f"one sequence of {max_model_len} tokens needs at least {needed * layout.block_bytes} bytes"
        )
    return num_blocks
