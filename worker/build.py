"""From a worker's configuration to an engine that can run: model, KV pool, scheduler, executor."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch

from ..core.errors import ModelError
from ..core.kv import KVLayout
from ..core.topology import WorkerConfig
from ..core.view import Role
from ..engine.blocks import BlockPool
from ..engine.cache import kv_layout, kv_tensor
from ..engine.executor import TorchExecutor
from ..engine.grammar import Grammars
from ..engine.loader import load_config, load_model, resolve_model
from ..engine.parallel import ParallelContext
from ..engine.scheduler import Scheduler, SchedulerConfig
from ..engine.timing import StepTimes
from ..kv_transfer.pool import PoolMemory
from ..policy.ordering import ORDERING

logger = logging.getLogger("baton.worker")


@dataclass(frozen=True, slots=True)
class Engine:
    """Everything of a worker that is not a socket."""

    layout: KVLayout
    memory: PoolMemory
    blocks: BlockPool
    scheduler: Scheduler
    executor: TorchExecutor
    times: StepTimes
    grammars: Grammars

    def close(self) -> None:
        self.executor.close()
        self.grammars.close()
        self.memory.close()


def build_engine(config: WorkerConfig) -> Engine:
    """Load the model, make and pre-fault the KV pool, warm up.

    Raises ModelError when the model cannot be loaded or its KV pool is too small for one sequence.
    """
    torch.set_num_threads(config.pool.threads)  # also for loading; the executor sets its own thread's
    started = time.monotonic()
    path = resolve_model(config.model.path, config.model.revision)
    model_config = load_config(path)
    parallel = ParallelContext()
    layout = kv_layout(model_config, config.pool.block_size, config.model.dtype, parallel)
    num_blocks = config.pool.kv_memory_bytes // layout.block_bytes
    limit = config.model.max_model_len or model_config.max_position_embeddings
    if num_blocks < layout.num_blocks_for(limit) + 1:
        need = (layout.num_blocks_for(limit) + 1) * layout.block_bytes
        raise ModelError(
            f"pools.{config.pool.role}.kv_memory: {config.pool.kv_memory_bytes} bytes hold {num_blocks} blocks of "
            f"{layout.block_bytes} bytes; one sequence of {limit} tokens needs at least {need} bytes"
        )
    spec = config.model
    kernels = spec.kernels, config.pool.threads, spec.deterministic
    model = load_model(path, spec.dtype, parallel, spec.max_model_len, *kernels)
    memory = PoolMemory.shared(num_blocks * layout.block_bytes)
    blocks = BlockPool(num_blocks, config.pool.block_size, config.pool.prefix_cache)
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
    grammars = Grammars(path, model_config.vocab_size, model_config.eos_token_ids)
    kv = kv_tensor(memory.buffer, layout, num_blocks)
    executor = TorchExecutor(model, kv, layout, config.pool.threads, config.pool.step_delay, grammars)
    times = StepTimes()
    for plan, seconds in executor.warm_up(min(config.pool.max_step_tokens, limit)):
        times.observe(plan, seconds)
    logger.info("engine ready: %d blocks of %d tokens, %.1f s", num_blocks, config.pool.block_size, time.monotonic() - started)
    return Engine(layout, memory, blocks, scheduler, executor, times, grammars)
