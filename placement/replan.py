"""Re-planning: what a running cluster's hardware could do if it were divided otherwise, and whether that is worth a change.

What runs and what might run are both topologies, simulated whole with the same requests, so that their goodputs compare pair by
pair. Nothing is changed here: the answer is a topology, and a verdict with its uncertainty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.errors import InvalidRequest
from ..core.observed import ObservedRequest, ObservedStep
from ..core.topology import PoolSpec, Topology
from ..core.view import Role
from .cluster import Cluster, Fabric, Supply
from .deployment import deployment_of, topology_of
from .executors import Executor
from .hardware import Accelerator
from .hysteresis import Gain, gain_of, worth_it
from .model_shape import ModelShape
from .objective import objective
from .observed import Build, ObservedCost, StepTimesSeen, Workload, workload_of
from .problem import Problem, SearchOptions, SearchResult
from .questions import Look, Question, answer, look
from .roofline import device_for_kv
from .search import OnProgress, Progress, search
from .space import Budgets, Need, Price
from .topology_setup import CPU, PoolCost, device_of, fabric_of, setup_of
from .trial import Case, Observation

NUM_RIVALS = 3
"""So many of the best placements found are compared whole with what runs."""
TOLERANCE = 0.15
"""By how much simulated and observed attainment may differ, and medians as shares of their objectives, until a plan made with
that simulation is believed."""
_MAX_SCALE = 6  # a cluster is simulated with up to so many times the requests of one worker


@dataclass(frozen=True, slots=True)
class Seen:
    """What was observed of a running cluster: `topology` with the objectives that count."""

    topology: Topology
    requests: Sequence[ObservedRequest]
    steps: Mapping[Role, Sequence[ObservedStep]]


@dataclass(frozen=True, slots=True)
class Rival:
    """A division of the hardware: a topology, its goodput with every seed, and the relative error of the step times behind it."""

    topology: Topology
    goodputs: tuple[float, ...]
    error: float

    @property
    def goodput(self) -> float:
        return sum(self.goodputs) / len(self.goodputs)


@dataclass(frozen=True, slots=True)
class Replan:
    """The answer.

    simulated   what the simulation says of what runs, at the rate that was observed
    doubts      why that is not what was observed; "" when it is
    alternative None when nothing else was found that reaches the objectives
    """

    workload: Workload
    now: Rival
    simulated: Observation
    doubts: str
    result: SearchResult
    alternative: Rival | None
    gain: Gain | None
    minimal: float

    @property
    def change(self) -> bool:
        return not self.doubts and self.gain is not None and worth_it(self.gain, self.minimal)


def replan(
    seen: Seen,
    model: ModelShape,
    options: SearchOptions,
    executor: Executor,
    *,
    goal: str = "goodput_per_gpu",
    minimal: float = 0.1,
    on_progress: OnProgress | None = None,
) -> Replan:
    """Search and compare. Raises Unavailable when too little was observed, InvalidRequest when it cannot be compared."""
    tell = on_progress or (lambda progress: None)
    topology = seen.topology
    workload = workload_of(seen.requests, topology.slo)
    devices = _devices(topology, model)
    times = _times(seen, model, devices)
    problem = _problem(topology, model, devices, workload, goal)

    def cost(device: Accelerator, tp: int, pp: int) -> Price:
        found = times.cost(Build(device, tp, pp))
        return Price(found.cost, found.overhead)

    result = search(problem, cost, options, executor, tell)
    rivals = [topology, *_rivals(result, topology)]
    tell(Progress("whole clusters", 0, len(rivals)))
    track = _Track(model, devices, times, workload, options)
    now, *others = track.compare(rivals, executor)
    simulated = executor.map(look, [track.look(topology)])[0]
    best = max(others, key=lambda rival: rival.goodput, default=None)
    if best is not None and best.goodput <= 0:
        best = None
    gain = None if best is None else gain_of(now.goodputs, best.goodputs, max(now.error, best.error))
    return Replan(workload, now, simulated, doubts_about(workload, simulated), result, best, gain, minimal)


def doubts_about(workload: Workload, simulated: Observation) -> str:
    """What the simulation of the running cluster gets wrong at the observed rate, in words; "" when it may be believed."""
    report = simulated.report
    if abs(report.attainment - workload.attainment) > TOLERANCE:
        return f"attainment is {workload.attainment:.0%} and the simulation says {report.attainment:.0%}"
    if max(report.attainment, workload.attainment) < report.slo.attainment:
        return ""  # both are overloaded: how long queues have become says how long it lasted
    for name, observed, spread, limit in (
        ("TTFT", workload.ttft, report.ttft, report.slo.ttft),
        ("TPOT", workload.tpot, report.tpot, report.slo.tpot),
    ):
        if observed is not None and spread is not None and abs(spread.p50 - observed) > TOLERANCE * limit:
            return f"the median {name} is {1000 * observed:.3g} ms and the simulation says {1000 * spread.p50:.3g} ms"
    return ""


def same_division(one: Topology, other: Topology) -> bool:
    """Whether both start the same workers."""
    return _division(one) == _division(other)


def _division(topology: Topology) -> list[tuple[str, str, int, int, int]]:
    return sorted(
        (pool.role, pool.accelerator, pool.tensor_parallel, pool.pipeline_parallel, pool.replicas) for pool in topology.pools
    )


# ---- the problem -----------------------------------------------------------------------------------


def _devices(topology: Topology, model: ModelShape) -> dict[str, Accelerator]:
    """By name. On a CPU one device is one worker's threads, with memory for the KV of an average running worker."""
    threads = {pool.threads for pool in topology.pools if pool.accelerator == CPU}
    if len(threads) > 1:
        raise InvalidRequest(
            f"pools on the CPU have {' and '.join(map(str, sorted(threads)))} threads; workers can be traded for each other only "
            "where all have the same number",
            "from-live",
        )
    found = {}
    for pool in topology.pools:
        device = device_of(pool)
        if device.name == CPU:
            kv = [each.kv_memory_bytes for each in topology.pools if each.accelerator == CPU for _ in range(each.replicas)]
            device = device_for_kv(model, device, sum(kv) / len(kv), topology.model.dtype)
        found[device.name] = device
    return found


def _times(seen: Seen, model: ModelShape, devices: Mapping[str, Accelerator]) -> StepTimesSeen:
    steps: dict[tuple[str, int, int], tuple[Build, list[ObservedStep]]] = {}
    for pool in seen.topology.pools:
        build = _build(pool, devices)
        steps.setdefault(build.key, (build, []))[1].extend(seen.steps.get(pool.role, ()))
    return StepTimesSeen(model, seen.topology.model.dtype, dict(steps.values()))


def _build(pool: PoolSpec, devices: Mapping[str, Accelerator]) -> Build:
    return Build(devices[device_of(pool).name], pool.tensor_parallel, pool.pipeline_parallel)


def _problem(topology: Topology, model: ModelShape, devices: Mapping[str, Accelerator], workload: Workload, goal: str) -> Problem:
    cluster = _hardware(topology, devices)
    limit = topology.model.max_model_len or model.max_model_len
    asked = objective(goal, cluster)
    need = Need(model, topology.model.dtype, limit)
    return Problem(need, cluster, workload.demand, topology.slo, asked, _budgets(topology))


def _hardware(topology: Topology, devices: Mapping[str, Accelerator]) -> Cluster:
    """What the running workers occupy."""
    counts = Counter[str]()
    for pool in topology.pools:
        counts[device_of(pool).name] += pool.replicas * pool.tensor_parallel * pool.pipeline_parallel
    fabric = fabric_of(topology)
    return Cluster(tuple(_supply(devices[name], count, fabric) for name, count in counts.items()))


def _supply(device: Accelerator, count: int, fabric: Fabric) -> Supply:
    """Workers on the CPU are all on one machine, as `baton up` starts them."""
    return Supply(device, count, count if device.name == CPU else device.devices_per_node, fabric)


def _budgets(topology: Topology) -> Budgets:
    """As the running pools have them; for a pool that does not run, the usual."""
    usual = Budgets()
    prefill, decode, mixed = (topology.pool(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    some = topology.pools[0]
    return Budgets(
        block_size=some.block_size,
        prefill_step_tokens=prefill.max_step_tokens if prefill else usual.prefill_step_tokens,
        decode_seqs=max(pool.max_num_seqs for pool in (decode, mixed, some) if pool),
        chunked_step_tokens=mixed.max_step_tokens if mixed else usual.chunked_step_tokens,
        colocated_step_tokens=usual.colocated_step_tokens,
    )


# ---- whole clusters --------------------------------------------------------------------------------


def _rivals(result: SearchResult, running: Topology) -> list[Topology]:
    """The best placements found as they would be deployed in place of what runs, each division once and not the running one."""
    found: list[Topology] = []
    for verdict in result.searched:
        if verdict.score <= 0 or len(found) == NUM_RIVALS:
            break
        deployment = deployment_of(result.problem, verdict)
        planned = topology_of(result.problem, deployment, running.cluster, running.model.path)
        if deployment.num_clusters > 1:
            continue  # the same router must reach all of it
        topology = _in_place_of(running, planned)
        if not any(same_division(topology, other) for other in (running, *found)):
            found.append(topology)
    return found


def _in_place_of(running: Topology, planned: Topology) -> Topology:
    """The running topology with the planned pools; a pool that ran keeps what the plan does not decide."""
    pools = []
    for pool in planned.pools:
        like = running.pool(pool.role) or running.pools[0]
        pools.append(
            replace(
                pool,
                threads=like.threads,
                prefix_cache=like.prefix_cache,
                ordering=like.ordering,
                step_delay=like.step_delay,
            )
        )
    return replace(running, pools=tuple(pools))


@dataclass(frozen=True, slots=True)
class _Track:
    """Where whole clusters are simulated: all with the same step times and the same requests."""

    model: ModelShape
    devices: Mapping[str, Accelerator]
    times: StepTimesSeen
    workload: Workload
    options: SearchOptions

    def compare(self, rivals: Sequence[Topology], executor: Executor) -> list[Rival]:
        """The goodput of each, seed by seed."""
        goodput = self.options.goodput
        cases = [self._case(topology) for topology in rivals]
        questions = [
            Question(case, self.workload.rate, math.inf, replace(goodput, seeds=(seed,)))
            for case in cases
            for seed in goodput.seeds
        ]
        found = [each.goodput.mean if each.goodput else 0.0 for each in executor.map(answer, questions)]
        each = len(goodput.seeds)
        return [
            Rival(topology, tuple(found[number * each : (number + 1) * each]), self._error(topology))
            for number, topology in enumerate(rivals)
        ]

    def look(self, topology: Topology) -> Look:
        """What it does at the observed rate."""
        return Look(self._case(topology), self.workload.rate, self.options.goodput.seeds[0])

    def _error(self, topology: Topology) -> float:
        return max(self._cost(pool).error for pool in topology.pools)

    def _cost(self, pool: PoolSpec) -> ObservedCost:
        return self.times.cost(_build(pool, self.devices))

    def _case(self, topology: Topology) -> Case:
        seen = {pool.role: self._cost(pool) for pool in topology.pools}
        costs = {role: PoolCost(each.cost, "observed", each.overhead) for role, each in seen.items()}
        # The delay of a slow device is in what was observed.
        plain = replace(topology, pools=tuple(replace(pool, step_delay=0.0) for pool in topology.pools))
        workers = max(pool.replicas for pool in topology.pools)
        num_requests = self.options.num_requests * min(workers, _MAX_SCALE)
        return Case(setup_of(plain, self.model, costs), self.workload.demand, topology.slo, num_requests)
