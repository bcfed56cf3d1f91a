"""The loads of the serving benchmarks, all of equal lengths, and what is said of them. One client for every server."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from baton.bench.driver import Target, run_load, warm_up
from baton.bench.metrics import Summary, client_warning, summarise
from baton.core.slo import Slo
from baton.simulator.workload.lengths import Length
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.synthetic import poisson_workload

WARM_UP_REQUESTS = 2
MAX_SEED = 1 << 31


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of every prompt and every answer."""

    input: int = 512
    output: int = 128

    def __str__(self) -> str:
        return f"{self.input} in / {self.output} out"


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one system. `complaints` say why its figures may not be what they seem."""

    summary: Summary
    complaints: tuple[str, ...]


def fresh_seed(wanted: int | None) -> int:
    """A seed that no earlier run had, so that no server's prefix cache knows the prompts; or the one asked for."""
    return secrets.randbelow(MAX_SEED) if wanted is None else wanted


async def warm(target: Target, lengths: Lengths) -> None:
    """Requests before a turn that do not count. Raises Unavailable when the server cannot serve them."""
    await warm_up(target, PlannedRequest(0, 0.0, lengths.input, lengths.output), WARM_UP_REQUESTS)


async def poisson(target: Target, rate: float, num_requests: int, lengths: Lengths, seed: int, slo: Slo) -> Measured:
    """An open loop at `rate` requests per second."""
    return await _load(target, rate, num_requests, None, lengths, seed, slo)


async def closed(target: Target, concurrency: int, num_requests: int, lengths: Lengths, seed: int, slo: Slo) -> Measured:
    """`concurrency` requests at a time, the next one as soon as one has ended."""
    return await _load(target, math.inf, num_requests, concurrency, lengths, seed, slo)


async def _load(
    target: Target, rate: float, num_requests: int, concurrency: int | None, lengths: Lengths, seed: int, slo: Slo
) -> Measured:
    inputs, outputs = (Length("fixed", count, count) for count in (lengths.input, lengths.output))
    workload = poisson_workload(rate, inputs, outputs, num_requests=num_requests, seed=seed)
    result = await run_load(target, workload, concurrency=concurrency)
    summary = summarise(result, slo)
    complaints = []
    if summary.num_failed:
        complaints.append(f"{summary.num_failed} of {summary.num_offered} requests failed: {dict(summary.errors)}")
    for what, wanted, got in (
        ("input", lengths.input, [record.prompt_tokens for record in result.records if record.ok]),
        ("output", lengths.output, [record.num_tokens for record in result.records if record.ok]),
    ):
        if wrong := [count for count in got if count is not None and count != wanted]:
            complaints.append(f"{len(wrong)} requests had other than {wanted} {what} tokens, such as {wrong[0]}")
    # A closed loop keeps no arrival times: only lateness of the client's own timers can spoil it.
    if warning := client_warning(summary, slo):
        complaints.append(warning)
    return Measured(summary, tuple(complaints))
