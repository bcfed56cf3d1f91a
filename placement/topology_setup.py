"""From a topology to what the simulator runs: KV blocks from memory, nodes from devices, step costs from profiles or a prior.

The same topology that `baton up` deploys. Must never read a file: the command line does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import TopologyError
from ..core.topology import PoolSpec, Topology
from ..core.view import Role
from ..simulator.setup import ClusterSetup, NetworkSetup, PoolSetup
from ..simulator.shape import StepCost
from .cluster import Fabric, narrower
from .hardware import Accelerator, find_accelerator
from .model_shape import ModelShape
from .profile import Profile
from .roofline import kv_capacity, roofline_cost

CPU = "cpu"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class PoolCost:
    """What prices the steps of one pool: `source` says whose numbers they are, `overhead` is host work between two steps."""

    cost: StepCost
    source: str
    overhead: float = 0.0


def setup_of(
    topology: Topology, shape: ModelShape, costs: Mapping[Role, PoolCost], fabric: Fabric | None = None, seed: int = 0
) -> ClusterSetup:
    """What `simulate` runs. `fabric` is what joins the workers; None takes what the accelerators' makers state.

    Raises TopologyError, naming every pool and key, for a model that cannot be split so and for memory that does not suffice.
    """
    problems = [problem for pool in topology.pools for problem in _problems(topology, pool, shape)]
    if problems:
        raise TopologyError("\n".join(problems))
    joined = fabric or fabric_of(topology)
    nodes = _place(topology.pools)
    return ClusterSetup(
        pools=tuple(_pool_setup(topology, pool, shape, costs[pool.role], nodes[pool.role]) for pool in topology.pools),
        network=NetworkSetup(
            kv_bytes_per_token=shape.kv_bytes_per_token(topology.model.dtype),
            bandwidth=joined.network,
            node_bandwidth=joined.node_link,
            latency=joined.latency,
            control=joined.control,
        ),
        slo=topology.slo,
        routing=topology.router.routing,
        admission=topology.router.admission,
        max_queue=topology.router.max_queue,
        local_prefill_tokens=topology.router.local_prefill_tokens,
        request_timeout=topology.router.request_timeout,
        lease=topology.kv_transfer.lease,
        seed=seed,
    )


def costs_of(topology: Topology, shape: ModelShape, profiles: Sequence[Profile] = ()) -> dict[Role, PoolCost]:
    """For every pool the profile that was measured on its accelerator (with its threads, on a CPU), or the roofline prior.

    Raises InvalidRequest for a profile of another model, for a parallelism that a matching profile lacks, and for an unknown
    accelerator; TopologyError for a profile that fits no pool.
    """
    costs = {pool.role: _pool_cost(topology, pool, shape, profiles) for pool in topology.pools}
    for profile in profiles:
        if not any(_fits(profile, pool) for pool in topology.pools):
            have = ", ".join(f"{pool.role}: {_device_text(pool)}" for pool in topology.pools)
            threads = f" with {profile.threads} threads" if profile.threads else ""
            raise TopologyError(
                f"the profile of {profile.model} was measured on {profile.accelerator}{threads}; the pools are {have}"
            )
    return costs


def fabric_of(topology: Topology, profiles: Sequence[Profile] = ()) -> Fabric:
    """What joins the workers: measured where a profile knows the topology's transport, else what the devices' makers state."""
    fabrics = [_fabric(pool, topology, profiles) for pool in topology.pools]
    joined = fabrics[0]
    for other in fabrics[1:]:
        joined = narrower(joined, other)
    return joined


def num_devices(topology: Topology) -> int:
    """Devices of all workers; a worker on the CPU counts its threads."""
    return sum(pool.replicas * _devices(pool) * (pool.threads if pool.accelerator == CPU else 1) for pool in topology.pools)


def device_of(pool: PoolSpec) -> Accelerator:
    """The catalogue's entry; on a CPU, as many cores of it as the worker has threads."""
    device = find_accelerator(pool.accelerator)
    if device.name != CPU:
        return device
    return replace(device, flops_16=device.flops_16 * pool.threads, flops_8=device.flops_8 * pool.threads)


def blocks_of(topology: Topology, pool: PoolSpec, shape: ModelShape) -> int:
    """KV blocks of every rank of one worker; where the topology leaves their number to the worker, what its GPU has room for."""
    if not pool.kv_memory_bytes:
        degrees = pool.tensor_parallel, pool.pipeline_parallel
        return int(
            kv_capacity(shape, device_of(pool), *degrees, topology.model.dtype, share=pool.gpu_memory_limit) // pool.block_size
        )
    per_token = shape.rank_kv_bytes_per_token(pool.tensor_parallel, pool.pipeline_parallel, topology.model.dtype)
    return int(pool.kv_memory_bytes // (per_token * pool.block_size))


def _pool_setup(topology: Topology, pool: PoolSpec, shape: ModelShape, cost: PoolCost, nodes: tuple[int, ...]) -> PoolSetup:
    return PoolSetup(
        role=pool.role,
        cost=cost.cost,
        replicas=pool.replicas,
        num_blocks=blocks_of(topology, pool, shape),
        block_size=pool.block_size,
        max_step_tokens=pool.max_step_tokens,
        max_num_seqs=pool.max_num_seqs,
        max_model_len=_limit(topology, shape),
        ordering=pool.ordering,
        prefix_cache=pool.prefix_cache,
        overhead=cost.overhead + pool.step_delay,
        nodes=nodes,
    )


def _pool_cost(topology: Topology, pool: PoolSpec, shape: ModelShape, profiles: Sequence[Profile]) -> PoolCost:
    profile = next((profile for profile in profiles if _fits(profile, pool)), None)
    degrees = pool.tensor_parallel, pool.pipeline_parallel
    if profile is not None:
        return PoolCost(profile.cost(shape, *degrees), f"measured on {_device_text(pool)}", profile.host_overhead)
    device = device_of(pool)
    return PoolCost(
        roofline_cost(shape, device, *degrees, topology.model.dtype), f"roofline of {_device_text(pool)}, not measured"
    )


def _fits(profile: Profile, pool: PoolSpec) -> bool:
    same = find_accelerator(profile.accelerator).name == find_accelerator(pool.accelerator).name
    return same and (pool.accelerator != CPU or profile.threads in (0, pool.threads))


def _fabric(pool: PoolSpec, topology: Topology, profiles: Sequence[Profile]) -> Fabric:
    device = find_accelerator(pool.accelerator)
    transport = "shm" if topology.kv_transfer.transport == "auto" else topology.kv_transfer.transport
    links = [profile.links[transport] for profile in profiles if _fits(profile, pool) and transport in profile.links]
    if links:
        return Fabric(links[0], min(links[0], device.network * device.devices_per_node))
    # Half the devices of a node send to the other half, each over a link of its own.
    return Fabric(device.link * max(1.0, device.devices_per_node / 2), device.network * device.devices_per_node)


def _place(pools: Sequence[PoolSpec]) -> dict[Role, tuple[int, ...]]:
    """The node of every worker: as close together as devices allow. Kinds of device do not share a node, and a worker that
    needs more than one node is at its first. CPU workers are all on one machine, as `baton up` starts them."""
    placed: dict[Role, tuple[int, ...]] = {}
    room: dict[str, tuple[int, int]] = {}  # by kind of device: its node, and the devices that are free there
    num_nodes = 0
    for pool in pools:
        device = find_accelerator(pool.accelerator)
        needed, nodes = _devices(pool), []
        for _ in range(pool.replicas):
            node, free = room.get(device.name, (-1, 0))
            if device.name == CPU and node >= 0:
                free = needed
            if free < needed:
                node, num_nodes = num_nodes, num_nodes + max(1, -(-needed // device.devices_per_node))
                free = max(device.devices_per_node, needed)
            room[device.name] = (node, free - needed)
            nodes.append(node)
        placed[pool.role] = tuple(nodes)
    return placed


def _problems(topology: Topology, pool: PoolSpec, shape: ModelShape) -> list[str]:
    where = f"pools.{pool.role}"
    degrees = shape.tensor_degrees(pool.tensor_parallel)
    if pool.tensor_parallel not in degrees:
        return [f"{where}.tensor_parallel: {pool.tensor_parallel} does not split {shape.name}; use {_choice(degrees)}"]
    if pool.pipeline_parallel > shape.num_layers:
        return [f"{where}.pipeline_parallel: {pool.pipeline_parallel} is more than the {shape.num_layers} layers of {shape.name}"]
    problems = []
    limit, num_blocks = _limit(topology, shape), blocks_of(topology, pool, shape)
    if limit > shape.max_model_len:
        problems.append(f"model.max_model_len: {limit} is more than {shape.name} was made for; use at most {shape.max_model_len}")
    needed = -(-limit // pool.block_size) + 1
    if num_blocks < needed:
        per_token = shape.rank_kv_bytes_per_token(pool.tensor_parallel, pool.pipeline_parallel, topology.model.dtype)
        size = needed * pool.block_size * per_token / _GIB
        problems.append(
            f"{where}.kv_memory: {pool.kv_memory_bytes / _GIB:.3g} GiB hold {num_blocks * pool.block_size} tokens; "
            f"one sequence of {limit} tokens needs {size:.3g} GiB, or set a smaller model.max_model_len"
        )
    device = device_of(pool)
    degrees, dtype = (pool.tensor_parallel, pool.pipeline_parallel), topology.model.dtype
    room = kv_capacity(shape, device, *degrees, dtype, dtype, share=1.0, reserve_bytes=0.0)
    if device.name != CPU and num_blocks * pool.block_size > room:
        weights = shape.rank_weight_bytes(pool.tensor_parallel, pool.pipeline_parallel, topology.model.dtype)
        problems.append(
            f"{where}.kv_memory: {pool.kv_memory_bytes / _GIB:.3g} GiB do not fit beside {weights / _GIB:.3g} GiB of weights "
            f"into the {device.memory_bytes / _GIB:.3g} GiB of {device.name}; use less of it or more tensor_parallel"
        )
    return problems


def _limit(topology: Topology, shape: ModelShape) -> int:
    return topology.model.max_model_len or shape.max_model_len


def _devices(pool: PoolSpec) -> int:
    return pool.tensor_parallel * pool.pipeline_parallel


def _device_text(pool: PoolSpec) -> str:
    return pool.accelerator if pool.accelerator != CPU else f"{pool.threads} core{'s' * (pool.threads > 1)} of a CPU"


def _choice(degrees: Sequence[int]) -> str:
    return ", ".join(map(str, degrees))
