"""Prefill of equal prompts against queueing theory: cases in which the mean TTFT is a formula.

Poisson arrivals, prompts that fill a step each, one output token. A device is then an M/D/1 queue; a pipeline of two stages is
one of half the service time with another stage behind it; tensor parallelism shortens the service time by a factor; random
routing over replicas splits a Poisson stream into thinner ones. The formulas are those that DistServe (Zhong et al., OSDI 2024,
section 3) reasons with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from baton.core.view import Role
from baton.simulator.cost import LinearCost
from baton.simulator.records import RequestOutcome
from baton.simulator.setup import ClusterSetup, PoolSetup
from baton.simulator.simulate import simulate
from baton.simulator.workload.planned import PlannedRequest

PROMPT = 64  # tokens, and of a step
SECONDS = 0.1  # of a prompt on one device (D): short beside the deadlines that the service sets a prefill
SPEEDUP = 1.7  # of two tensor-parallel ranks: K
REPLICAS = 3
LOADS = (0.3, 0.5, 0.7)  # shares of what the devices can do
TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve. seconds: of a prompt on one stage; `latency` more pass behind the first stage."""

    name: str
    formula: str
    seconds: float
    stages: int = 1
    replicas: int = 1

    @property
    def latency(self) -> float:
        return (self.stages - 1) * self.seconds

    def rate(self, load: float) -> float:
        """Requests/s that load it so."""
        return load * self.replicas / self.seconds

    def mean_ttft(self, rate: float) -> float:
        """By the formula: the queue before the first stage of one replica, and the service."""
        mine = rate / self.replicas
        wait = mine * self.seconds**2 / (2 * (1 - mine * self.seconds))
        return self.seconds + wait + self.latency


SYSTEMS = (
    System("one device", "D + RD²/(2(1-RD))", SECONDS),
    System("two stages", "D + RD²/(4(2-RD))", SECONDS / 2, stages=2),
    System(f"two ranks, K = {SPEEDUP}", "D/K + R(D/K)²/(2(1-RD/K))", SECONDS / SPEEDUP),
    System(f"{REPLICAS} replicas", "D + (R/N)D²/(2(1-RD/N))", SECONDS, replicas=REPLICAS),
)


@dataclass(frozen=True, slots=True)
class Compared:
    """worst: the largest difference of any request from a queue, worked out arrival by arrival, in seconds."""

    system: System
    load: float
    simulated: float
    worst: float

    @property
    def exact(self) -> float:
        return self.system.mean_ttft(self.system.rate(self.load))

    @property
    def relative(self) -> float:
        return self.simulated / self.exact - 1


def compare(system: System, load: float, num_requests: int) -> Compared:
    """Simulate `num_requests` prompts."""
    pool = PoolSetup(
        Role.MIXED,
        LinearCost(step=system.seconds, stages=system.stages),
        replicas=system.replicas,
        max_step_tokens=PROMPT,
    )
    setup = ClusterSetup((pool,), routing="random")
    outcomes = simulate(setup, _poisson(num_requests, system.rate(load))).outcomes
    times = [outcome.ttft for outcome in outcomes if outcome.ttft is not None]
    if len(times) < num_requests:
        raise RuntimeError(f"{system.name}: {num_requests - len(times)} of {num_requests} prompts were not served")
    return Compared(system, load, sum(times) / num_requests, _worst(system, outcomes))


def table(compared: Sequence[Compared]) -> str:
    """In Markdown."""
    titles = ("system", "formula", "load", "formula, s", "simulated, s", "difference", "worst request")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [
        f"| {each.system.name} | {each.system.formula} | {each.load:.0%} | {each.exact:.5f} | {each.simulated:.5f} "
        f"| {each.relative:+.2%} | {each.worst * 1e9:.0f} ns |"
        for each in compared
    ]
    return "\n".join(lines)


def _poisson(count: int, rate: float) -> Iterator[PlannedRequest]:
    draws, at = Random("arrivals"), 0.0  # not the seed of the cluster, which draws the routes
    for index in range(count):
        at += draws.expovariate(rate)
        yield PlannedRequest(index, at, PROMPT, 1)


def _worst(system: System, outcomes: Sequence[RequestOutcome]) -> float:
    """Against Lindley's recursion on each replica's own arrivals."""
    free_at: dict[str, float] = {}
    worst = 0.0
    for outcome in outcomes:
        begun = max(outcome.arrival, free_at.get(outcome.prefill_worker, 0.0))
        free_at[outcome.prefill_worker] = begun + system.seconds
        expected = begun + system.seconds + system.latency - outcome.arrival
        worst = max(worst, abs((outcome.ttft or 0.0) - expected))
    return worst
