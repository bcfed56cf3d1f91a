"""Upper bounds on long-run goodput, cheap enough for every candidate: what cannot win is never simulated.

Each holds for whatever a scheduler may do, given a cost that grows with every number of a step's shape and in which attention
is added to the rest (as in `simulator.cost` and `roofline`). A pruned candidate therefore never beats the winner: tests
compare with trying everything. None of them knows of queueing: they are no estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.shape import StepShape
from ..core.slo import Slo
from ..core.view import Role
from ..simulator.shape import StepCost
from .cluster import Cluster
from .demand import Demand, Lengths
from .space import Affinity, Placement, PoolChoice

_EXACT = 64  # batch sizes up to which each is tried
_GRID = 1.02  # ratio of neighbours beyond
_MULTIPLIERS = (0.0, *(0.05 * 1.5**power for power in range(16)))


@dataclass(frozen=True, slots=True)
class Lone:
    """One request alone on a worker, per entry of a demand's mix: the best TTFT and TPOT there can be (None: one token)."""

    ttft: tuple[float, ...]
    tpot: tuple[float | None, ...]


def lone_ttfts(pool: PoolChoice, demand: Demand) -> tuple[float, ...]:
    """Seconds to prefill each prompt of the mix on an idle worker."""
    prompts = {prompt for prompt, _ in demand.mix}
    known = {prompt: _lone_prefill(pool.kind.cost, prompt, pool.max_step_tokens) for prompt in prompts}
    return tuple(known[prompt] for prompt, _ in demand.mix)


def lone_tpots(pool: PoolChoice, demand: Demand) -> tuple[float | None, ...]:
    """Seconds per token after the first, for each request of the mix on an idle worker."""
    known = {pair: _lone_decode(pool.kind.cost, pair) for pair in set(demand.mix)}
    return tuple(known[pair] for pair in demand.mix)


def lone(placement: Placement, demand: Demand) -> Lone:
    """Of a placement: its prefill worker makes the first token, its decode worker the others."""
    return Lone(lone_ttfts(_first(placement), demand), lone_tpots(_last(placement), demand))


def lone_attainment(alone: Lone, slo: Slo) -> float:
    """Share of the mix that meets the objectives on an idle cluster: no rate has a larger attainment."""
    met = sum(slo.met_by(ttft, tpot) for ttft, tpot in zip(alone.ttft, alone.tpot, strict=True))
    return met / len(alone.ttft)


def nearest_scale(alone: Lone, slo: Slo) -> float:
    """By how much both objectives must be relaxed for an idle cluster to reach the attainment; at most 1 when it does already."""
    scales = sorted(max(ttft / slo.ttft, (tpot or 0.0) / slo.tpot) for ttft, tpot in zip(alone.ttft, alone.tpot, strict=True))
    return scales[max(0, math.ceil(slo.attainment * len(scales) - 1e-9) - 1)]


def goodput_bound(placement: Placement, demand: Demand, slo: Slo, cluster: Cluster, kv_bytes: float) -> float:
    """Requests/s that the placement cannot exceed in the long run; 0 when even lone requests miss. kv_bytes: KV of one token."""
    if lone_attainment(lone(placement, demand), slo) < slo.attainment:
        return 0.0
    first, last = _first(placement), _last(placement)
    bound = min(first.replicas * prefill_bound(first, demand), last.replicas * decode_bound(last, demand, slo))
    if first is last:
        return min(bound, first.replicas * mixed_bound(first, demand))
    return min(bound, link_bound(placement, demand, cluster, kv_bytes))


def prefill_bound(pool: PoolChoice, demand: Demand) -> float:
    """Requests/s of one worker of the pool that does nothing but prefill, in the batch size that suits it best.

    A step of T tokens takes at least T times the least seconds per token; every prompt's pairs come on top of its tokens,
    however it is cut into chunks.
    """
    tokens = demand.mean_input
    pairs_per_token = sum(prompt * (prompt + 1) / 2 for prompt, _ in demand.mix) / len(demand.mix) / tokens
    cost = pool.kind.cost
    fastest = max(
        count / cost.seconds(StepShape(prefill_rows=1, prefill_tokens=count, prefill_pairs=int(count * pairs_per_token)))
        for count in _sizes(pool.max_step_tokens)
    )
    return fastest * _between(pool.max_step_tokens) / tokens


def decode_bound(pool: PoolChoice, demand: Demand, slo: Slo) -> float:
    """Requests/s of one worker of the pool that does nothing but decode; inf when nobody asks for a second token.

    With b rows a step makes b tokens in f(b) seconds of a stage; a row waits for all stages. Over all steps, the tokens of
    requests that meet TPOT wait no longer than it on average. For every multiplier m >= 0 therefore
    tokens/s <= max over b of (b - m b (stages f(b) - tpot)) / f(b) (Lagrange), and the KV pool bounds b.
    """
    tokens = sorted(output - 1 for _, output in demand.mix)
    if tokens[-1] == 0:
        return math.inf
    steps = sum(tokens)
    context = sum((output - 1) * (prompt + (output + 1) / 2) for prompt, output in demand.mix) / steps
    batches, wider, stages = _decode_batches(pool, context), _between(_most_rows(pool, context)), pool.kind.cost.stages
    every = max(rows / took for rows, took in batches) / (steps / len(tokens))
    meeting = sum(tokens[: math.ceil(slo.attainment * len(tokens) - 1e-9)]) / len(tokens)
    if meeting == 0:
        return every * wider
    within = min(
        max(rows * (1 - weight / slo.tpot * (stages * took - slo.tpot)) / took for rows, took in batches)
        for weight in _MULTIPLIERS
    )
    return min(every, within / meeting) * wider


def mixed_bound(pool: PoolChoice, demand: Demand) -> float:
    """Requests/s of one worker that does both phases, TPOT aside.

    As for prefill: every fed token, of a prompt or of an answer, takes at least the least seconds per token, in steps of the
    best size; pairs and contexts come on top however they are spread. KV room bounds the decode rows, and so the size.
    """
    count = len(demand.mix)
    fed, decoded = demand.mean_input, sum(output - 1 for _, output in demand.mix) / count
    pairs = sum(prompt * (prompt + 1) / 2 for prompt, _ in demand.mix) / count
    context = sum((output - 1) * (prompt + (output + 1) / 2) for prompt, output in demand.mix) / count
    total = fed + decoded
    most = pool.max_step_tokens
    if decoded:
        most = min(most, math.ceil(_most_rows(pool, context / decoded) * total / decoded))
    cost = pool.kind.cost

    def seconds(tokens: int) -> float:
        part = tokens / total
        rows = int(decoded * part)
        return cost.seconds(StepShape(0, tokens - rows, int(pairs * part), 0, rows, int(context * part)))

    return max(tokens / seconds(tokens) for tokens in _sizes(most)) * _between(most) / total


def decode_estimate(pool: PoolChoice, demand: Demand, slo: Slo) -> float:
    """Requests/s of one decode worker whose batch never fluctuates: the largest batch with steps within TPOT. inf as above."""
    steps = sum(output - 1 for _, output in demand.mix)
    if steps == 0:
        return math.inf
    context = sum((output - 1) * (prompt + (output + 1) / 2) for prompt, output in demand.mix) / steps
    stages = pool.kind.cost.stages
    within = (rows / took for rows, took in _decode_batches(pool, context) if stages * took <= slo.tpot)
    return max(within, default=0.0) / (steps / len(demand.mix))


def _most_rows(pool: PoolChoice, context: float) -> int:
    """Decode rows of one stage's batch for which there is KV room and a place in the step."""
    return min(pool.max_num_seqs, math.ceil(pool.kind.kv_tokens / (context * pool.kind.cost.stages)))


def _decode_batches(pool: PoolChoice, context: float) -> list[tuple[int, float]]:
    """Batch sizes and the seconds of a stage's step."""
    return [
        (rows, pool.kind.cost.seconds(StepShape(decode_rows=rows, decode_context=int(rows * context), sampled=rows)))
        for rows in _sizes(_most_rows(pool, context))
    ]


def link_bound(placement: Placement, demand: Demand, cluster: Cluster, kv_bytes: float) -> float:
    """Requests/s whose KV the links carry: those out of the prefill workers' nodes, or those within them."""
    if placement.affinity is Affinity.NONE:
        return math.inf
    share = sum(prompt for prompt, output in demand.mix if output > 1) / len(demand.mix)
    if share == 0:
        return math.inf
    prefill = placement.pools[0]
    supply = cluster.supply(prefill.kind.accelerator)
    if placement.affinity is Affinity.NODE:
        return supply.fabric.node_link / (share * kv_bytes)
    return num_nodes(prefill, cluster) * supply.fabric.network / (share * kv_bytes)


def num_nodes(pool: PoolChoice, cluster: Cluster) -> int:
    """Nodes that hold the first ranks of the pool's workers, packed close."""
    per_node = max(1, cluster.supply(pool.kind.accelerator).per_node // pool.kind.num_devices)
    return -(-pool.replicas // per_node)


def _first(placement: Placement) -> PoolChoice:
    return placement.pool(Role.PREFILL) or placement.pools[0]


def _last(placement: Placement) -> PoolChoice:
    return placement.pool(Role.DECODE) or placement.pools[0]


def _sizes(most: int) -> list[int]:
    """Batch sizes from 1 to `most`, close enough to each other."""
    sizes = list(range(1, min(most, _EXACT) + 1))
    while sizes[-1] < most:
        sizes.append(min(most, math.ceil(sizes[-1] * _GRID)))
    return sizes


def _between(most: int) -> float:
    """By how much a size between two tried ones may be better than they: a time that grows with the size may also stand still."""
    return 1.0 if most <= _EXACT else 1 + 2 * (_GRID - 1)


def _lone_prefill(cost: StepCost, prompt: int, budget: int) -> float:
    """Chunks of at most `budget` tokens follow each other through the stages."""
    total = last = 0.0
    for start in range(0, prompt, budget):
        fed = min(budget, prompt - start)
        ends = int(start + fed == prompt)
        last = cost.seconds(StepShape(1, fed, fed * start + fed * (fed + 1) // 2, start + fed, sampled=ends))
        total += last
    return total + (cost.stages - 1) * last


def _lone_decode(cost: StepCost, pair: Lengths) -> float | None:
    prompt, output = pair
    if output < 2:
        return None
    return cost.stages * cost.decode_seconds(1, prompt + 1, output - 1) / (output - 1)
