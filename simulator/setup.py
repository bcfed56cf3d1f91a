"""What is simulated: pools of equal workers with what prices them, links between them, and the service's own settings.

Frozen data, made from a topology and a profile by `placement`, or by hand in tests. Nothing here reads a file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.slo import Slo
from ..core.view import Role
from .shape import StepCost


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """One pool of equal workers.

    cost             prices its steps; `cost.stages` is its pipeline parallelism
    num_blocks       KV blocks of a worker (of each of its ranks)
    max_context      tokens that the sequences of one step may hold together; all take turns then. 0 is no limit. Only for the
                     comparison with simulators that cap a decode batch so
    phases_apart     a step prefills or decodes, never both, and prefill goes first: colocated engines without chunked prefill
    eager_pipeline   pipeline stages take whatever is ready, however many steps are under way: simulators without micro-batches
    overhead         seconds of host work per step during which the device idles, beyond what `cost` says
    token_overhead   the same per token of context of the step's rows; it and `overhead` precede the first pipeline stage alone
    node             workers on one node share its links: worker i of the pool is on node `nodes[i]`; empty puts each
                     on a node of its own
    """

    role: Role
    cost: StepCost
    replicas: int = 1
    num_blocks: int = 4096
    block_size: int = 32
    max_step_tokens: int = 2048
    max_num_seqs: int = 64
    max_model_len: int = 1 << 20
    ordering: str = "fcfs"
    prefix_cache: bool = False
    max_context: int = 0
    phases_apart: bool = False
    eager_pipeline: bool = False
    overhead: float = 0.0
    token_overhead: float = 0.0
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkSetup:
    """What KV moves over. Every node has one link out and one in; transfers share each fairly (max-min).

    kv_bytes_per_token  bytes of KV of one token, all layers and heads
    bandwidth           bytes/s of a node's link in each direction; inf: transfers take `latency` alone
    node_bandwidth      bytes/s between two workers of one node
    latency             seconds of one transfer beyond its bytes
    control             seconds of a message between router and worker, one way
    """

    kv_bytes_per_token: float = 0.0
    bandwidth: float = math.inf
    node_bandwidth: float = math.inf
    latency: float = 0.0
    control: float = 0.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker that dies at a moment: its process is confirmed dead `noticed` seconds later, and a new one joins after `restart`
    (inf: never)."""

    worker: str
    at: float
    noticed: float = 0.1
    restart: float = 10.0


@dataclass(frozen=True, slots=True)
class ClusterSetup:
    """A whole cluster. Policies are named as in a topology; `seed` feeds every random draw."""

    pools: tuple[PoolSetup, ...]
    network: NetworkSetup = NetworkSetup()
    slo: Slo = Slo()
    routing: str = "least_loaded"
    admission: str = "none"
    max_queue: int = 1 << 30
    local_prefill_tokens: int = 0
    request_timeout: float = math.inf
    lease: float = 3.0
    failures: tuple[Failure, ...] = ()
    seed: int = 0
