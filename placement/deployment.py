"""From a placement to what is deployed: how many copies, in how many clusters, and their topology as `baton up` reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.slo import Slo
from ..core.topology import ModelSpec, PoolSpec, Topology
from .objective import FEWEST
from .problem import Problem, Verdict
from .space import Affinity, Placement, PoolChoice, copies_that_fit


@dataclass(frozen=True, slots=True)
class Deployment:
    """What to start.

    cluster_placement  the pools of one cluster: the placement found, `copies` times
    num_clusters       clusters of it: more than one where KV must stay within a node, since a router chooses among all workers
    rate               requests/s of all clusters together within the objectives
    wanted             requests/s that were asked for; None when the whole hardware is to be used
    spare              devices left over, by kind
    """

    cluster_placement: Placement
    copies: int
    num_clusters: int
    rate: float
    wanted: float | None
    spare: tuple[tuple[str, int], ...]

    @property
    def num_devices(self) -> int:
        return self.cluster_placement.num_devices * self.num_clusters

    @property
    def suffices(self) -> bool:
        """Whether it carries what was asked for."""
        return self.wanted is None or self.rate >= self.wanted * (1 - 1e-9)


def deployment_of(problem: Problem, best: Verdict) -> Deployment:
    """Enough copies for the rate that is wanted; without one, all that fit."""
    placement, objective = best.placement, problem.objective
    goodput = best.rate
    fit = copies_that_fit(placement, problem.cluster)
    copies = fit
    if objective.name == FEWEST:
        copies = 1
    elif objective.rate is not None:
        copies = min(fit, max(1, math.ceil(objective.rate / goodput - 1e-9)))
    in_cluster = copies
    if placement.affinity is Affinity.NODE:
        per_node = problem.cluster.supply(placement.pools[0].kind.accelerator).per_node
        in_cluster = max(1, min(copies, per_node // placement.num_devices))
    num_clusters = -(-copies // in_cluster)
    whole = placement.times(in_cluster)
    used = {name: count * num_clusters for name, count in whole.devices().items()}
    left = ((supply.accelerator.name, supply.count) for supply in problem.cluster.supplies)
    spare = tuple((name, count - used.get(name, 0)) for name, count in left)
    return Deployment(whole, in_cluster, num_clusters, goodput * in_cluster * num_clusters, objective.rate, spare)


def topology_of(problem: Problem, deployment: Deployment, name: str, model_path: str) -> Topology:
    """One of the deployment's clusters."""
    placement = deployment.cluster_placement
    one_node = placement.affinity is Affinity.NODE and placement.pools[0].kind.pp == 1
    return Topology(
        cluster=name,
        model=ModelSpec(model_path, dtype=problem.need.dtype, max_model_len=problem.need.max_len),
        pools=tuple(_pool_spec(problem, pool) for pool in placement.pools),
        slo=Slo(problem.slo.ttft, problem.slo.tpot, problem.slo.attainment),
        ray_placement="strict_pack" if one_node else "pack",
    )


def _pool_spec(problem: Problem, pool: PoolChoice) -> PoolSpec:
    kind = pool.kind
    block_bytes = problem.need.model.rank_kv_bytes_per_token(kind.tp, kind.pp, problem.need.dtype) * kind.block_size
    mebibytes = max(1, math.floor(kind.num_blocks * block_bytes) >> 20)
    return PoolSpec(
        role=pool.role,
        replicas=pool.replicas,
        tensor_parallel=kind.tp,
        pipeline_parallel=kind.pp,
        accelerator=kind.accelerator,
        max_step_tokens=pool.max_step_tokens,
        max_num_seqs=pool.max_num_seqs,
        block_size=kind.block_size,
        kv_memory_bytes=mebibytes << 20,
    )
