"""Every way to place a model on a cluster: per pool a kind of device, tensor and pipeline parallelism, and replicas.

One space holds DistServe's two algorithms (Zhong et al., OSDI 2024) as its limits: with `Affinity.ANY` prefill and decode
workers stand on any nodes and KV crosses the network (Algorithm 1); with `Affinity.NODE` the prefill and decode segments of
each stage share a node and KV stays within it (Algorithm 2). Workers of a `mixed` pool move no KV: with a large step
budget they are the colocated baseline, with a small one chunked prefill. What does not fit in memory is left out with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from ..core.errors import InvalidRequest
from ..core.view import Role
from ..simulator.shape import StepCost
from .cluster import Cluster, Supply
from .hardware import Accelerator
from .model_shape import ModelShape
from .roofline import kv_capacity


@dataclass(frozen=True, slots=True)
class Price:
    """What prices a worker's steps, and the host's seconds between two of them."""

    cost: StepCost
    overhead: float = 0.0


CostMaker = Callable[[Accelerator, int, int], Price | None]
"""Prices a worker on a kind of device with a tensor and a pipeline parallelism; None where nothing is known of it."""


class Affinity(StrEnum):
    """Where KV moves."""

    NODE = "node"
    ANY = "any"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a worker of each pool may batch. A mixed pool is tried with each of its step budgets."""

    block_size: int = 32
    prefill_step_tokens: int = 2048
    decode_seqs: int = 256
    chunked_step_tokens: int = 512
    colocated_step_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """One way to build a worker. `num_blocks` KV blocks fit on each of its ranks beside the weights."""

    accelerator: str
    tp: int
    pp: int
    num_blocks: int
    block_size: int
    cost: StepCost
    overhead: float = 0.0

    @property
    def kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def num_devices(self) -> int:
        return self.tp * self.pp

    @property
    def name(self) -> str:
        return f"{self.accelerator} TP{self.tp}" + (f" PP{self.pp}" if self.pp > 1 else "")


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """One pool of a placement."""

    role: Role
    kind: WorkerKind
    replicas: int
    max_step_tokens: int
    max_num_seqs: int

    @property
    def num_devices(self) -> int:
        return self.kind.num_devices * self.replicas


@dataclass(frozen=True, slots=True)
class Placement:
    """A whole placement: a prefill and a decode pool, or a mixed one. family is one of the four names below."""

    pools: tuple[PoolChoice, ...]
    affinity: Affinity
    family: str

    @property
    def num_devices(self) -> int:
        return sum(pool.num_devices for pool in self.pools)

    @property
    def name(self) -> str:
        parts = [f"{_LETTER[pool.role]}: {pool.replicas} x {pool.kind.name}" for pool in self.pools]
        return f"{', '.join(parts)} ({self.family})"

    def pool(self, role: Role) -> PoolChoice | None:
        return next((pool for pool in self.pools if pool.role is role), None)

    def devices(self) -> dict[str, int]:
        """How many of each kind it takes."""
        counts: dict[str, int] = {}
        for pool in self.pools:
            counts[pool.kind.accelerator] = counts.get(pool.kind.accelerator, 0) + pool.num_devices
        return counts

    def times(self, copies: int) -> Placement:
        """The same proportions, `copies` times as large."""
        return replace(self, pools=tuple(replace(pool, replicas=pool.replicas * copies) for pool in self.pools))


APART_ANY, APART_NODE, COLOCATED, CHUNKED = "apart, any nodes", "apart, one node", "colocated", "chunked"
_LETTER = {Role.PREFILL: "P", Role.DECODE: "D", Role.MIXED: "M"}


@dataclass(frozen=True, slots=True)
class Unfit:
    """A way to build a worker that cannot hold the model, and why."""

    accelerator: str
    tp: int
    pp: int
    reason: str


@dataclass(frozen=True, slots=True)
class Need:
    """What every worker must hold: the model, and one request of `max_len` tokens."""

    model: ModelShape
    dtype: str
    max_len: int


def worker_kinds(cluster: Cluster, need: Need, budgets: Budgets, cost: CostMaker) -> tuple[list[WorkerKind], list[Unfit]]:
    """All TP x PP of every kind of device that hold the model, and those that do not.

    TP stays within a node; a worker is larger than a node only where the model needs it, and then no more than twice as large
    as it must be: beyond, more replicas do the same with less waiting for each other.
    """
    fit: list[WorkerKind] = []
    unfit: list[Unfit] = []
    for supply in cluster.supplies:
        least: int | None = None  # devices of the smallest worker that holds the model
        for tp, pp in sorted(_degrees(supply, need.model), key=lambda degrees: degrees[0] * degrees[1]):
            if least is not None and tp * pp > max(supply.per_node, 2 * least):
                continue
            room = kv_capacity(need.model, supply.accelerator, tp, pp, need.dtype, need.dtype)
            if room < need.max_len + budgets.block_size:
                unfit.append(Unfit(supply.accelerator.name, tp, pp, _why_unfit(supply, need, tp, pp, room)))
                continue
            least = least or tp * pp
            price = cost(supply.accelerator, tp, pp)
            if price is None:
                unfit.append(Unfit(supply.accelerator.name, tp, pp, "its step times were not measured"))
                continue
            blocks = room // budgets.block_size
            kind = WorkerKind(supply.accelerator.name, tp, pp, blocks, budgets.block_size, price.cost, price.overhead)
            fit.append(kind)
    return fit, unfit


def _degrees(supply: Supply, model: ModelShape) -> Iterator[tuple[int, int]]:
    """Powers of two that split the model: others leave devices of a node idle."""
    for tp in model.tensor_degrees(min(supply.per_node, supply.count)):
        for pp in model.pipeline_degrees(supply.count // tp):
            if not (tp & (tp - 1) or pp & (pp - 1)):
                yield tp, pp


def _why_unfit(supply: Supply, need: Need, tp: int, pp: int, room: int) -> str:
    weights = need.model.rank_weight_bytes(tp, pp, need.dtype)
    memory = f"{_gib(supply.accelerator.memory_bytes)} of a GPU"
    if room == 0:
        return f"{_gib(weights)} of weights leave no room for KV in the {memory}"
    return f"beside {_gib(weights)} of weights the {memory} have room for the KV of {room} tokens, not of {need.max_len}"


def _gib(number: float) -> str:
    return f"{number / (1 << 30):.3g} GiB"


def check_fit(kinds: list[WorkerKind], unfit: list[Unfit], cluster: Cluster, need: Need) -> None:
    """Raises InvalidRequest when nothing holds the model, saying what came nearest."""
    if kinds:
        return
    last = max(unfit, key=lambda way: way.tp * way.pp, default=None)
    nearest = f"; the widest way tried, {last.accelerator} TP{last.tp} PP{last.pp}: {last.reason}" if last else ""
    raise InvalidRequest(
        f"{need.model.name} ({_gib(need.model.weight_bytes(need.dtype))} of weights, requests of up to {need.max_len} tokens) "
        f"does not fit on {cluster}{nearest}; give more or larger GPUs, or shorter requests",
        "gpu",
    )


def mixed_placements(kinds: Iterable[WorkerKind], budgets: Budgets) -> Iterator[Placement]:
    """One worker that does both, colocated and with chunked prefill."""
    for kind in kinds:
        for family, tokens in ((COLOCATED, budgets.colocated_step_tokens), (CHUNKED, budgets.chunked_step_tokens)):
            yield Placement((PoolChoice(Role.MIXED, kind, 1, tokens, budgets.decode_seqs),), Affinity.NONE, family)


def split_placement(
    prefill: WorkerKind, decode: WorkerKind, replicas: tuple[int, int], affinity: Affinity, budgets: Budgets
) -> Placement:
    """Prefill and decode apart."""
    pools = (
        PoolChoice(Role.PREFILL, prefill, replicas[0], budgets.prefill_step_tokens, budgets.decode_seqs),
        PoolChoice(Role.DECODE, decode, replicas[1], budgets.prefill_step_tokens, budgets.decode_seqs),
    )
    return Placement(pools, affinity, APART_NODE if affinity is Affinity.NODE else APART_ANY)


def fits(placement: Placement, cluster: Cluster) -> bool:
    """Whether the cluster has the devices and, with `Affinity.NODE`, whether the segments of each stage share a node."""
    if any(count > cluster.supply(name).count for name, count in placement.devices().items()):
        return False
    if placement.affinity is not Affinity.NODE:
        return True
    prefill, decode = placement.pools
    if prefill.kind.accelerator != decode.kind.accelerator:
        return False
    supply = cluster.supply(prefill.kind.accelerator)
    if placement.num_devices <= supply.per_node:
        return True
    segment = prefill.replicas * prefill.kind.tp + decode.replicas * decode.kind.tp  # devices of one stage of both pools
    if prefill.kind.pp != decode.kind.pp or segment > supply.per_node:
        return False
    return -(-prefill.kind.pp // (supply.per_node // segment)) <= supply.num_nodes


def copies_that_fit(placement: Placement, cluster: Cluster) -> int:
    """How often the placement fits side by side."""
    by_count = min(cluster.supply(name).count // count for name, count in placement.devices().items())
    if placement.affinity is not Affinity.NODE:
        return by_count
    supply = cluster.supply(placement.pools[0].kind.accelerator)
    if placement.num_devices <= supply.per_node:
        return min(by_count, supply.per_node // placement.num_devices * supply.num_nodes)
    prefill, decode = placement.pools
    segments = supply.per_node // (prefill.replicas * prefill.kind.tp + decode.replicas * decode.kind.tp)
    return min(by_count, supply.num_nodes * segments // prefill.kind.pp)
