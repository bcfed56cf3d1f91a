"""A worker's model and KV pool on its GPU, within its share of the memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.errors import ModelError, Unavailable
from ..core.kv import KVLayout
from ..core.topology import ANY_GPU, WorkerConfig
from ..engine.executor import TorchExecutor
from ..engine.gpu.executor import DeviceExecutor
from ..engine.gpu.memory import blocks_in, kv_budget, measured_workspace
from ..engine.grammar import Grammars
from ..engine.loader import load_model, torch_dtype
from ..engine.model.interface import CausalModel
from ..engine.parallel import ParallelContext
from ..kernels.device import CudaDevice, Device
from ..kv_transfer.cuda_ipc import CudaMappings
from ..kv_transfer.device_pool import DevicePool
from ..kv_transfer.pool import KvMemory

KERNELS = "triton"  # what `auto` means on a GPU
OTHERS = ("native", "cpu")  # kernels that run on the CPU alone

logger = logging.getLogger("baton.worker")


@dataclass(frozen=True, slots=True)
class Placed:
    """What of a worker depends on where it runs. handle: see `core.kv.Endpoint`."""

    memory: KvMemory
    num_blocks: int
    executor: TorchExecutor | DeviceExecutor
    handle: bytes = b""


def open_gpu(config: WorkerConfig) -> CudaDevice:
    """The worker's GPU. Raises ModelError when it is not there, or the topology asks for kernels that do not run on it."""
    pool, where = config.pool, f"pools.{config.pool.role}.accelerator"
    if config.model.kernels in OTHERS:
        raise ModelError(f"model.kernels: {config.model.kernels!r} run on the CPU, and {where} is {pool.accelerator!r}; use auto")
    if config.model.deterministic:
        raise ModelError(f"model.deterministic: not to be had on a GPU, and {where} is {pool.accelerator!r}; leave it out")
    try:
        device = CudaDevice(config.gpu, pool.gpu_memory_limit)
    except Unavailable as error:
        raise ModelError(f"{where}: {error}") from error
    if pool.accelerator != ANY_GPU and pool.accelerator.partition("-")[0].lower() not in device.name.lower():
        logger.warning("%s is %r, and this worker runs on an %s", where, pool.accelerator, device.name)
    return device


def place_on_gpu(config: WorkerConfig, path: Path, layout: KVLayout, limit: int, grammars: Grammars, device: Device) -> Placed:
    """Load the model onto `device`, make the KV pool beside it. Raises ModelError when they do not fit the worker's share."""
    spec, pool = config.model, config.pool
    kernels = KERNELS if spec.kernels == "auto" else spec.kernels
    where = f"pools.{pool.role}"
    try:
        model = load_model(
            path, spec.dtype, ParallelContext(), spec.max_model_len, kernels, pool.threads, device=device.torch_device
        )
        size = pool.kv_memory_bytes or _left_for_kv(config, model, layout, limit, device)
        num_blocks = blocks_in(size, layout, limit, f"{where}.{'kv_memory' if pool.kv_memory_bytes else 'gpu_memory_fraction'}")
        kv = _pool_tensor(layout, num_blocks, device)
    except torch.cuda.OutOfMemoryError as error:
        sizes = device.memory()
        raise ModelError(
            f"{where}: model and KV pool do not fit into {pool.gpu_memory_limit:g} of the {sizes.total >> 20} MiB of "
            f"{device.name}, of which {sizes.free >> 20} MiB are free; set a smaller kv_memory or a larger gpu_memory_fraction"
        ) from error
    memory = DevicePool(kv, layout.block_bytes, device)
    executor = DeviceExecutor(model, kv, layout, device, pool.max_num_seqs, grammars, pool.step_delay, memory.arrivals)
    handle = CudaMappings.export(memory.flat) if device.torch_device.type == "cuda" else b""
    return Placed(memory, num_blocks, executor, handle)


def _left_for_kv(config: WorkerConfig, model: CausalModel, layout: KVLayout, limit: int, device: Device) -> int:
    """Bytes that are left when the largest steps have taken what they need, found out by running them over a small pool."""
    pool = config.pool
    chunk = min(pool.max_step_tokens, limit)

    def run() -> int:
        num_blocks = layout.num_blocks_for(chunk) + 1
        executor = DeviceExecutor(model, _pool_tensor(layout, num_blocks, device), layout, device, pool.max_num_seqs)
        executor.warm_up(chunk)
        executor.close()
        return num_blocks * layout.block_bytes

    return kv_budget(device.memory(), pool.gpu_memory_limit, measured_workspace(device, run))


def _pool_tensor(layout: KVLayout, num_blocks: int, device: Device) -> torch.Tensor:
    """kv[block, layer, 2, kv_head, slot, dim] on the device, in one allocation."""
    shape = num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim
    return torch.zeros(shape, dtype=torch_dtype(layout.dtype), device=device.torch_device)
