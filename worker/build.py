"""From a worker's configuration to an engine that can run: model, KV pool, scheduler, executor."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.kv import KVLayout
from ..core.topology import WorkerConfig
from ..core.view import Role
from ..engine.blocks import BlockPool
from ..engine.cache import kv_layout, kv_tensor
from ..engine.executor import TorchExecutor
from ..engine.gpu.executor import DeviceExecutor
from ..engine.gpu.memory import blocks_in
from ..engine.grammar import Grammars
from ..engine.loader import load_config, load_model, resolve_model
from ..engine.parallel import ParallelContext
from ..engine.scheduler import Scheduler, SchedulerConfig
from ..engine.timing import StepTimes
from ..kv_transfer.pool import KvMemory, PoolMemory
from ..policy.ordering import ORDERING
from .gpu import Placed, open_gpu, place_on_gpu

logger = logging.getLogger("baton.worker")


@dataclass(frozen=True, slots=True)
class Engine:
    """Everything of a worker that is not a socket.

    handle  what processes of this host open the pool by when it is on a GPU
    """

    layout: KVLayout
    memory: KvMemory
    blocks: BlockPool
    scheduler: Scheduler
    executor: TorchExecutor | DeviceExecutor
    times: StepTimes
    grammars: Grammars
    handle: bytes = b""

    def close(self) -> None:
        self.executor.close()
        self.grammars.close()
        self.memory.close()


def build_engine(config: WorkerConfig) -> Engine:
    """Load the model, make and pre-fault the KV pool, warm up.

    Raises ModelError when the model cannot be loaded, its KV pool is too small for one sequence, or its GPU is not there.
    """
    torch.set_num_threads(config.pool.threads)  # also for loading; the executor sets its own thread's
    started = time.monotonic()
    device = open_gpu(config) if config.pool.on_gpu else None
    path = resolve_model(config.model.path, config.model.revision)
    model_config = load_config(path)
    layout = kv_layout(model_config, config.pool.block_size, config.model.dtype)
    limit = config.model.max_model_len or model_config.max_position_embeddings
    grammars = Grammars(path, model_config.vocab_size, model_config.eos_token_ids)
    parts = config, path, layout, limit, grammars
    placed = _place_on_cpu(*parts) if device is None else place_on_gpu(*parts, device)
    blocks = BlockPool(placed.num_blocks, config.pool.block_size, config.pool.prefix_cache)
    scheduler = Scheduler(
        blocks,
        SchedulerConfig(
            max_step_tokens=config.pool.max_step_tokens,
            max_num_seqs=config.pool.max_num_seqs,
            max_model_len=limit,
            return_preempted=config.pool.role is Role.DECODE,
            prefix_cache=config.pool.prefix_cache,
        ),
        ORDERING[config.pool.ordering],
    )
    times = StepTimes()
    for plan, seconds in placed.executor.warm_up(min(config.pool.max_step_tokens, limit)):
        times.observe(plan, seconds)
    num_blocks, seconds = placed.num_blocks, time.monotonic() - started
    logger.info("engine ready: %d blocks of %d tokens, %.1f s", num_blocks, config.pool.block_size, seconds)
    return Engine(layout, placed.memory, blocks, scheduler, placed.executor, times, grammars, placed.handle)


def _place_on_cpu(config: WorkerConfig, path: Path, layout: KVLayout, limit: int, grammars: Grammars) -> Placed:
    spec, pool = config.model, config.pool
    num_blocks = blocks_in(pool.kv_memory_bytes, layout, limit, f"pools.{pool.role}.kv_memory")
    kernels = spec.kernels, pool.threads, spec.deterministic
    model = load_model(path, spec.dtype, ParallelContext(), spec.max_model_len, *kernels)
    memory = PoolMemory.shared(num_blocks * layout.block_bytes)
    kv = kv_tensor(memory.buffer, layout, num_blocks)
    return Placed(memory, num_blocks, TorchExecutor(model, kv, layout, pool.threads, pool.step_delay, grammars))
