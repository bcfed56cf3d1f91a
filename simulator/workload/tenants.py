"""Several tenants in one workload: each with its own share of the requests, its own lengths and its own priority."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from ...core.errors import InvalidRequest
from .arrivals import Arrivals
from .lengths import RequestLengths
from .planned import PlannedRequest
from .synthetic import arrival_times


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant. `share` is its part of all requests, in any unit; a higher `priority` goes first."""

    name: str
    lengths: RequestLengths
    share: float = 1.0
    priority: int = 0


def tenant_workload(
    tenants: tuple[Tenant, ...],
    arrivals: Arrivals,
    *,
    num_requests: int | None = None,
    duration: float | None = None,
    seed: int = 0,
) -> Iterator[PlannedRequest]:
    """One stream of arrivals of which every request belongs to a tenant by lot: with Poisson arrivals, each tenant's own are
    Poisson too. The n-th request of a tenant has the same lengths whatever the others do.

    Raises InvalidRequest, before the first request, for tenants that cannot be and for a workload without an end.
    """
    names = [tenant.name for tenant in tenants]
    if not tenants or len(set(names)) < len(names):
        raise InvalidRequest(f"tenants {names}: there must be one at least, each with a name of its own", "tenants")
    for tenant in tenants:
        if not 0 < tenant.share < float("inf"):
            raise InvalidRequest(f"tenant {tenant.name!r}: share {tenant.share} must be a number above 0", "tenants")
    times = arrival_times(arrivals, num_requests, duration, seed)
    return _mixed(tenants, times, seed)


def _mixed(tenants: tuple[Tenant, ...], times: Iterator[float], seed: int) -> Iterator[PlannedRequest]:
    bounds = list(accumulate(tenant.share for tenant in tenants))
    lot = Random(f"{seed}/tenants")
    draws = [(Random(f"{seed}/{tenant.name}/input"), Random(f"{seed}/{tenant.name}/output")) for tenant in tenants]
    for index, at in enumerate(times):
        number = min(bisect_right(bounds, lot.random() * bounds[-1]), len(tenants) - 1)
        tenant = tenants[number]
        prompt, answer = tenant.lengths.draw(*draws[number])
        yield PlannedRequest(index, at, prompt, answer, tenant=tenant.name, priority=tenant.priority)
