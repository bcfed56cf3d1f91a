"""What can be known to go wrong before anything is started. Looks; changes nothing.

Everything found is reported at once, with the line of the topology that asks for the impossible.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from ..core.errors import ModelError, TopologyError
from ..core.kv import KVLayout
from ..core.topology import PoolSpec, Topology
from ..engine.model_config import ModelConfig, load_config  # the one module of the engine that needs no torch
from .gpus import local_gpus, num_gpus
from .ports import why_taken
from .schema import split_host_port
from .settings import TopologyFile
from .yaml_marks import Marks


def check_topology(file: TopologyFile) -> None:
    """Raise TopologyError when `file` cannot be deployed from this host, saying everything that stands in the way."""
    topology, marks = file.topology, file.marks
    problems = _unsupported(topology, marks)
    model = _model_config(topology, marks, problems)
    if model is not None:
        problems += _size_problems(topology, marks, model)
    if topology.launcher != "ray" or topology.ray_address is None:  # elsewhere, this host's memory and ports say nothing
        problems += _port_problems(topology, marks)
        problems += _memory_problems(topology, marks, _weight_bytes(topology))
        problems += _gpu_problems(topology, marks, _weight_bytes(topology))
    if problems:
        raise TopologyError("\n".join(problems))


def _unsupported(topology: Topology, marks: Marks) -> list[str]:
    return [
        f"{marks.at(('pools', pool.role.value, 'gpu_memory_fraction'))}: {pool.gpu_memory_fraction:g} says nothing of a pool on "
        "the CPU; set accelerator to cuda, or leave it out"
        for pool in topology.pools
        if pool.gpu_memory_fraction is not None and not pool.on_gpu
    ] + [
        f"{marks.at(('pools', pool.role.value, key))}: {degree} is not supported yet; use 1, and more replicas instead"
        for pool in topology.pools
        for key, degree in (("tensor_parallel", pool.tensor_parallel), ("pipeline_parallel", pool.pipeline_parallel))
        if degree > 1
    ]


def _model_config(topology: Topology, marks: Marks, problems: list[str]) -> ModelConfig | None:
    """Read the model's config.json. None for a hub id, which the workers fetch, and for a folder that is no model."""
    folder = Path(topology.model.path)
    if not folder.is_absolute():
        return None
    where = marks.at(("model", "path"))
    if not folder.is_dir():
        problems.append(f"{where}: there is no folder {folder}; needed: a folder in Hugging Face format")
        return None
    if not _weight_bytes(topology):
        problems.append(f"{where}: {folder} holds no *.safetensors; needed: a folder in Hugging Face format")
    try:
        return load_config(folder)
    except ModelError as error:
        problems.append(f"{where}: {error}")
        return None


def _weight_bytes(topology: Topology) -> int:
    """Size of the model's weights on disk; 0 for a hub id."""
    folder = Path(topology.model.path)
    return sum(shard.stat().st_size for shard in folder.glob("*.safetensors")) if folder.is_absolute() else 0


def _size_problems(topology: Topology, marks: Marks, model: ModelConfig) -> list[str]:
    """The model's limit, and whether every pool's KV memory holds one sequence of the longest allowed kind."""
    problems = []
    limit = topology.model.max_model_len or model.max_position_embeddings
    if limit > model.max_position_embeddings:
        problems.append(
            f"{marks.at(('model', 'max_model_len'))}: {limit} is not allowed; "
            f"this model was made for at most {model.max_position_embeddings} positions"
        )
        limit = model.max_position_embeddings
    for pool in topology.pools:
        layout = KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, pool.block_size, topology.model.dtype)
        num_needed = layout.num_blocks_for(limit) + 1
        if pool.kv_memory_bytes and pool.kv_memory_bytes // layout.block_bytes < num_needed:
            problems.append(
                f"{marks.at(('pools', pool.role.value, 'kv_memory'))}: {_size(pool.kv_memory_bytes)} is too small; one sequence "
                f"of {limit} tokens takes {num_needed} blocks of {_size(layout.block_bytes)}: at least "
                f"{_size(num_needed * layout.block_bytes)}, or a smaller model.max_model_len"
            )
    return problems


def _port_problems(topology: Topology, marks: Marks) -> list[str]:
    problems = []
    for key, address in (("grpc", topology.router.grpc), ("http", topology.router.http)):
        host, port = split_host_port(address)
        reason = why_taken(host, port)
        if reason:
            problems.append(f"{marks.at(('router', key))}: {reason}; choose another, or port 0 for any free one")
    if topology.router.grpc == topology.router.http and split_host_port(topology.router.grpc)[1] != 0:
        problems.append(f"{marks.at(('router', 'http'))}: {topology.router.http} is router.grpc's already; choose another port")
    return problems


def _memory_problems(topology: Topology, marks: Marks, weight_bytes: int) -> list[str]:
    needs = {pool.role.value: _memory(pool, weight_bytes) for pool in topology.pools if not pool.on_gpu}
    total, available = sum(needs.values()), psutil.virtual_memory().available
    if total <= available:
        return []
    parts = ", ".join(f"{role} {_size(amount)}" for role, amount in needs.items())
    return [f"{marks.at(('pools',))}: these pools need {_size(total)} ({parts}) and this machine has {_size(available)} free"]


def _gpu_problems(topology: Topology, marks: Marks, weight_bytes: int) -> list[str]:
    """Whether this machine has the GPUs, and whether weights and KV pool fit into each worker's share of one."""
    pools = [pool for pool in topology.pools if pool.on_gpu]
    if not pools:
        return []
    gpus = local_gpus()
    if not gpus:
        return [
            f"{marks.at(('pools', pool.role.value, 'accelerator'))}: {pool.accelerator!r} asks for a GPU, and nvidia-smi finds "
            "none on this machine; use cpu, or start the cluster where the GPUs are"
            for pool in pools
        ]
    problems = []
    needed = num_gpus(pools)
    if needed > len(gpus):
        problems.append(
            f"{marks.at(('pools',))}: these workers need {needed} GPUs and this machine has {len(gpus)}; use fewer replicas, or "
            "a gpu_memory_fraction in each pool: workers share a GPU whose fractions add up to at most 1"
        )
    smallest = min(gpus, key=lambda gpu: gpu.total_bytes)
    for pool in pools:
        if weight_bytes + pool.kv_memory_bytes > pool.gpu_memory_limit * smallest.total_bytes:
            share = f"{pool.gpu_memory_limit:g} of the {_size(smallest.total_bytes)} of {smallest.name}"
            problems.append(
                f"{marks.at(('pools', pool.role.value))}: weights of {_size(weight_bytes)} and a KV pool of "
                f"{_size(pool.kv_memory_bytes)} do not fit into {share}; set a smaller kv_memory, or leave it out "
                "to use what is left"
            )
    return problems


def _memory(pool: PoolSpec, weight_bytes: int) -> int:
    """Bytes of all replicas of a pool; what torch itself takes is not counted."""
    return pool.replicas * (pool.kv_memory_bytes + weight_bytes)


def _size(num_bytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
