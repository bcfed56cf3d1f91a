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
    if problems:
        raise TopologyError("\n".join(problems))


def _unsupported(topology: Topology, marks: Marks) -> list[str]:
    return [
        f"{marks.at(('pools', pool.role.value, 'accelerator'))}: {pool.accelerator!r} is not supported yet; use cpu"
        for pool in topology.pools
        if pool.accelerator != "cpu"
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
        if pool.kv_memory_bytes // layout.block_bytes < num_needed:
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
    needs = {pool.role.value: _memory(pool, weight_bytes) for pool in topology.pools if pool.accelerator == "cpu"}
    total, available = sum(needs.values()), psutil.virtual_memory().available
    if total <= available:
        return []
    parts = ", ".join(f"{role} {_size(amount)}" for role, amount in needs.items())
    return [f"{marks.at(('pools',))}: these pools need {_size(total)} ({parts}) and this machine has {_size(available)} free"]


def _memory(pool: PoolSpec, weight_bytes: int) -> int:
    """Bytes of all replicas of a pool; what torch itself takes is not counted."""
    return pool.replicas * (pool.kv_memory_bytes + weight_bytes)


def _size(num_bytes: int) -> str:
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
