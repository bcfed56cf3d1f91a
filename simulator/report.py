"""What a simulation says: attainment, times, where requests waited, how busy everything was, and what binds.

Outcomes are counted as they come and forgotten, so that a day of traffic takes no more memory than a minute. Attainment is over
all offered requests; times are over those that ended well. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..core.slo import Slo
from ..core.view import Role
from .records import LinkUse, RequestOutcome, WorkerUse
from .setup import ClusterSetup
from .sketch import Sketch

STAGES = ("queue", "prefill", "handoff", "decode")
"""What the life of a request consists of: arrival, first plan, first token, KV landed, last token stand between them."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds, over `count` values; quantiles within half a percent."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class PoolUse:
    """What the workers of one role did, on average over them and the run.

    busy          share of the time in which a device worked; `busiest` is that of the busiest worker
    mean_batch    decode rows in a running step
    batch_limit   sequences that a step may hold
    kv_used       mean share of the KV pool in use, `kv_peak` the largest of any worker at any time
    waiting       sequences and reservations that waited for blocks
    """

    role: str
    num_workers: int
    busy: float
    busiest: float
    steps: int
    tokens_per_second: float
    mean_batch: float
    batch_limit: int
    kv_used: float
    kv_peak: float
    waiting: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class LinkLoad:
    """One direction of one node's network.

    busy   share of the time in which anything moved
    rate   bytes/s on average; `used` is that over the bandwidth, 0 where there is no limit
    """

    name: str
    busy: float
    rate: float
    used: float
    peak_backlog: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """How near one resource is to its limit: 1 is there. `why` says it in numbers."""

    resource: str
    value: float
    why: str


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What binds: the resource whose limit costs the most requests, or would be reached first.

    binding    False where the objectives are met: then `resource` is only the nearest to its limit
    resource   `prefill compute`, `decode batch`, `KV memory`, `link` or `admission`
    pressures  of all resources, the highest first
    """

    resource: str
    binding: bool
    why: str
    pressures: tuple[Pressure, ...]


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """Attainment of one tenant."""

    tenant: str
    num_offered: int
    attainment: float


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """The figures of one simulation. Rates are per second of `duration`.

    num_late_first, num_slow_tokens   requests that ended well and missed TTFT, TPOT (one may miss both)
    goodput          requests that met both objectives, per second; `goodput_per_device` where the number of devices is known
    stages           mean seconds of the requests that ended well, by `STAGES`
    num_restarted    requests that were started over at least once
    """

    slo: Slo
    duration: float
    num_offered: int
    num_finished: int
    num_met: int
    num_late_first: int
    num_slow_tokens: int
    num_restarted: int
    offered_rate: float
    request_rate: float
    attainment: float
    goodput: float
    goodput_per_device: float | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    output_token_rate: float
    ttft: Spread | None
    tpot: Spread | None
    latency: Spread | None
    stages: tuple[tuple[str, Spread], ...]
    errors: tuple[tuple[str, int], ...]
    tenants: tuple[TenantFigures, ...]
    pools: tuple[PoolUse, ...]
    links: tuple[LinkLoad, ...]
    bottleneck: Bottleneck

    @property
    def num_failed(self) -> int:
        return self.num_offered - self.num_finished


class OutcomeTally:
    """Counts outcomes; `add` is a sink for `simulate`."""

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.num_offered = self.num_finished = self.num_met = 0
        self.num_late_first = self.num_slow_tokens = self.num_restarted = 0
        self.input_tokens = self.cached_tokens = self.output_tokens = 0
        self.last_arrival = 0.0
        self.ttft, self.tpot, self.latency = Sketch(), Sketch(), Sketch()
        self.handoff_share = Sketch()  # of TPOT, for those that missed it: what the handoff took
        self.late_queue = Sketch()  # of TTFT, for those that missed it: the share before the first plan
        self.stages = {stage: Sketch() for stage in STAGES}
        self.errors: Counter[str] = Counter()
        self.tenants: dict[str, list[int]] = {}  # offered, met

    def add(self, outcome: RequestOutcome) -> None:
        met = outcome.meets(self.slo)
        self.num_offered += 1
        self.num_met += met
        self.num_restarted += outcome.attempts > 1
        self.last_arrival = max(self.last_arrival, outcome.arrival)
        self.output_tokens += outcome.num_tokens
        tenant = self.tenants.setdefault(outcome.tenant, [0, 0])
        tenant[0] += 1
        tenant[1] += met
        if outcome.ok:
            self._add_finished(outcome)
        else:
            self.errors[outcome.error or "no token"] += 1

    def _add_finished(self, outcome: RequestOutcome) -> None:
        self.num_finished += 1
        self.input_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        ttft, tpot, end = outcome.ttft, outcome.tpot, outcome.end
        assert ttft is not None and end is not None  # noqa: PT018  # it ended well
        first = outcome.arrival + ttft
        began = outcome.arrival if outcome.prefill_start is None else min(outcome.prefill_start, first)
        landed = first if outcome.landed is None else min(max(outcome.landed, first), end)
        self.ttft.add(ttft)
        self.latency.add(end - outcome.arrival)
        for stage, seconds in zip(STAGES, (began - outcome.arrival, first - began, landed - first, end - landed), strict=True):
            self.stages[stage].add(seconds)
        if ttft > self.slo.ttft:
            self.num_late_first += 1
            self.late_queue.add((began - outcome.arrival) / ttft)
        if tpot is not None:
            self.tpot.add(tpot)
            if tpot > self.slo.tpot:
                self.num_slow_tokens += 1
                self.handoff_share.add((landed - first) / (end - first))


def tally_of(outcomes: Iterable[RequestOutcome], slo: Slo) -> OutcomeTally:
    """All of `outcomes`, counted."""
    tally = OutcomeTally(slo)
    for outcome in outcomes:
        tally.add(outcome)
    return tally


def make_report(
    setup: ClusterSetup,
    tally: OutcomeTally,
    duration: float,
    workers: Sequence[WorkerUse],
    links: Sequence[LinkUse],
    num_devices: int | None = None,
) -> SimulationReport:
    """The figures of a simulation of `setup` whose outcomes were counted in `tally`."""
    seconds = max(duration, 1e-9)
    pools = tuple(_pool_use(setup, role, uses, seconds) for role, uses in _by_role(workers).items())
    loads = tuple(_link_load(setup, link, seconds) for link in links)
    return SimulationReport(
        slo=tally.slo,
        duration=duration,
        num_offered=tally.num_offered,
        num_finished=tally.num_finished,
        num_met=tally.num_met,
        num_late_first=tally.num_late_first,
        num_slow_tokens=tally.num_slow_tokens,
        num_restarted=tally.num_restarted,
        offered_rate=tally.num_offered / tally.last_arrival if tally.last_arrival > 0 else 0.0,
        request_rate=tally.num_finished / seconds,
        attainment=tally.num_met / tally.num_offered if tally.num_offered else 0.0,
        goodput=tally.num_met / seconds,
        goodput_per_device=tally.num_met / seconds / num_devices if num_devices else None,
        input_tokens=tally.input_tokens,
        cached_tokens=tally.cached_tokens,
        output_tokens=tally.output_tokens,
        output_token_rate=tally.output_tokens / seconds,
        ttft=_spread(tally.ttft),
        tpot=_spread(tally.tpot),
        latency=_spread(tally.latency),
        stages=tuple((stage, spread) for stage in STAGES if (spread := _spread(tally.stages[stage]))),
        errors=tuple(tally.errors.most_common()),
        tenants=tuple(TenantFigures(name, offered, met / offered) for name, (offered, met) in sorted(tally.tenants.items())),
        pools=pools,
        links=loads,
        bottleneck=find_bottleneck(tally, pools, loads),
    )


def find_bottleneck(tally: OutcomeTally, pools: Sequence[PoolUse], links: Sequence[LinkLoad]) -> Bottleneck:
    """Missed objectives are followed to their cause; where none is missed, the resource nearest to its limit is named."""
    pressures = tuple(sorted(_pressures(tally, pools, links), key=lambda pressure: -pressure.value))
    by_name = {pressure.resource: pressure for pressure in pressures}
    num_missed = tally.num_offered - tally.num_met
    if num_missed <= (1 - tally.slo.attainment) * tally.num_offered:
        nearest = pressures[0]
        return Bottleneck(nearest.resource, False, nearest.why, pressures)
    num_failed = tally.num_offered - tally.num_finished
    if num_failed >= max(tally.num_late_first, tally.num_slow_tokens):
        kinds = ", ".join(f"{count} x {kind}" for kind, count in tally.errors.most_common(3))
        return Bottleneck("admission", True, f"{num_failed} of {tally.num_offered} requests got no answer: {kinds}", pressures)
    if tally.num_late_first >= tally.num_slow_tokens:
        resource = _cause_of_late_first(tally, pools)
        share = f"{tally.late_queue.quantile(0.5):.0%} of the time to first token of those that missed it is waiting"
        why = f"{tally.num_late_first} missed TTFT; {share}; {by_name[resource].why}"
    else:
        resource = _cause_of_slow_tokens(tally, by_name)
        share = (
            f"the handoff is {tally.handoff_share.quantile(0.5):.0%} of the time after the first token of those that missed it"
        )
        why = f"{tally.num_slow_tokens} missed TPOT; {share}; {by_name[resource].why}"
    return Bottleneck(resource, True, why, pressures)


def _cause_of_late_first(tally: OutcomeTally, pools: Sequence[PoolUse]) -> str:
    """Late first tokens: prefill itself, unless they waited for a place: in a mixed worker's full batch, or for blocks while
    the device that should have prefilled them idled (KV that decode workers have no room for stays at prefill workers)."""
    pool = _pool(pools, Role.PREFILL) or _pool(pools, Role.MIXED)
    if pool is None or tally.late_queue.quantile(0.5) <= 0.5:
        return "prefill compute"
    if pool.role == Role.MIXED and pool.mean_batch >= 0.9 * pool.batch_limit:
        return "decode batch"
    starved = pool.busy < 0.8 and (pool.waiting > 0 or pool.preemptions > 0)
    return "KV memory" if starved else "prefill compute"


def _cause_of_slow_tokens(tally: OutcomeTally, pressures: dict[str, Pressure]) -> str:
    """Slow tokens: decode itself, unless most of the time went by before the KV had landed. That is the link's fault if it
    was busy, and the decode pool's memory, for which the handoff waited, if not."""
    if tally.handoff_share.quantile(0.5) <= 0.5:
        return "decode batch"
    return "link" if pressures["link"].value >= pressures["KV memory"].value else "KV memory"


def _pressures(tally: OutcomeTally, pools: Sequence[PoolUse], links: Sequence[LinkLoad]) -> list[Pressure]:
    prefill = _pool(pools, Role.PREFILL) or _pool(pools, Role.MIXED)
    decode = _pool(pools, Role.DECODE) or _pool(pools, Role.MIXED)
    found = []
    busy = prefill.busy if prefill else 0.0
    found.append(Pressure("prefill compute", busy, f"prefilling devices are busy {busy:.0%} of the time"))
    batch = decode.mean_batch / decode.batch_limit if decode else 0.0
    # As fast as the objective asks, for as many as must meet it: the batch cannot grow any more.
    speed = tally.tpot.quantile(tally.slo.attainment) / tally.slo.tpot if tally.slo.tpot > 0 else math.inf
    rows, limit = (decode.mean_batch, decode.batch_limit) if decode else (0.0, 0)
    found.append(
        Pressure(
            "decode batch",
            max(batch, speed),
            f"{rows:.1f} of at most {limit} sequences decode in a step, and TPOT is {speed:.0%} of its objective "
            f"at the {tally.slo.attainment:.0%} quantile",
        )
    )
    fullest = max(pools, key=lambda pool: (_is_short(pool), pool.kv_used), default=None)
    used = fullest.kv_used if fullest else 0.0
    if fullest is None:
        text = "no KV pool"
    else:
        text = f"KV pools of {fullest.role} workers are used to {used:.0%} on average and {fullest.kv_peak:.0%} at most"
        text += f", {fullest.preemptions} sequences lost their blocks" if fullest.preemptions else ""
    found.append(Pressure("KV memory", max(used, 1.0) if fullest and _is_short(fullest) else used, text))
    link = max(links, key=lambda load: load.busy, default=None)
    busiest = "nothing moves" if link is None else f"{link.name} moves bytes {link.busy:.0%} of the time"
    found.append(Pressure("link", link.busy if link else 0.0, busiest))
    return found


def _is_short(pool: PoolUse) -> bool:
    """Whether more was to be done there than KV memory allowed."""
    return pool.preemptions > 0 or (pool.waiting > 0.5 and pool.kv_peak > 0.9)


def _pool(pools: Sequence[PoolUse], role: Role) -> PoolUse | None:
    return next((pool for pool in pools if pool.role == role), None)


def _by_role(workers: Sequence[WorkerUse]) -> dict[str, list[WorkerUse]]:
    by_role: dict[str, list[WorkerUse]] = {}
    for worker in workers:
        by_role.setdefault(worker.role, []).append(worker)
    return by_role


def _pool_use(setup: ClusterSetup, role: str, uses: Sequence[WorkerUse], seconds: float) -> PoolUse:
    busy = sum(use.busy for use in uses)
    limits = [pool.max_num_seqs for pool in setup.pools if pool.role == role]
    return PoolUse(
        role=role,
        num_workers=len(uses),
        busy=busy / len(uses) / seconds,
        busiest=max(use.busy for use in uses) / seconds,
        steps=sum(use.steps for use in uses),
        tokens_per_second=sum(use.tokens for use in uses) / seconds,
        mean_batch=sum(use.decode_row_seconds for use in uses) / busy if busy > 0 else 0.0,
        batch_limit=max(limits, default=1),
        kv_used=sum(use.kv_token_seconds for use in uses) / len(uses) / seconds,
        kv_peak=max(use.peak_kv for use in uses),
        waiting=sum(use.waiting_seconds for use in uses) / seconds,
        preemptions=sum(use.preemptions for use in uses),
    )


def _link_load(setup: ClusterSetup, link: LinkUse, seconds: float) -> LinkLoad:
    internal = link.name.endswith("internal")
    bandwidth = setup.network.node_bandwidth if internal else setup.network.bandwidth
    rate = link.bytes / seconds
    return LinkLoad(link.name, link.busy / seconds, rate, rate / bandwidth, link.peak_backlog)


def _spread(sketch: Sketch) -> Spread | None:
    if not sketch.count:
        return None
    p50, p90, p99 = (sketch.quantile(share) for share in (0.5, 0.9, 0.99))
    return Spread(sketch.count, sketch.mean, p50, p90, p99, sketch.max)
