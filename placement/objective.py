"""What a placement is judged by: goodput per GPU, per dollar, per watt, or how few GPUs carry a given rate.

A score grows with goodput, so that an upper bound on goodput gives an upper bound on the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import InvalidRequest
from .cluster import Cluster
from .space import Placement


@dataclass(frozen=True, slots=True)
class Objective:
    """One of `OBJECTIVES` on a cluster. `rate` (requests/s) matters to `fewest_gpus` alone; `unit` names the score's unit."""

    name: str
    cluster: Cluster
    rate: float | None = None

    def cost(self, placement: Placement) -> float:
        """What the goodput is divided by: GPUs, dollars per hour / 3600, or watts."""
        each = _COSTS[self.name]
        return sum(count * each(self.cluster, kind) for kind, count in placement.devices().items())

    def score(self, placement: Placement, goodput: float) -> float:
        """Larger is better; 0 is of no use."""
        if self.name == FEWEST:
            return 1.0 / placement.num_devices if goodput >= (self.rate or 0.0) else 0.0
        return goodput / self.cost(placement)

    def rate_to_beat(self, placement: Placement, score: float) -> float:
        """The goodput from which on the placement scores at least `score`; inf when none is enough."""
        if self.name == FEWEST:
            return (self.rate or 0.0) if 1.0 / placement.num_devices >= score else math.inf
        return score * self.cost(placement)

    @property
    def unit(self) -> str:
        return _UNITS[self.name]


def objective(name: str, cluster: Cluster, rate: float | None = None) -> Objective:
    """Raises InvalidRequest for an unknown name, and when the fewest GPUs are asked for without a rate."""
    if name not in _COSTS:
        raise InvalidRequest(f"--objective: {name!r} is unknown; allowed are {', '.join(OBJECTIVES)}", "objective")
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidRequest(f"--rate: {rate}; it must be a number of requests/s above 0", "rate")
    if name == FEWEST and rate is None:
        raise InvalidRequest(f"--objective {FEWEST} needs --rate: the requests/s that must be carried", "rate")
    return Objective(name, cluster, rate)


def _per_gpu(cluster: Cluster, kind: str) -> float:
    return 1.0


def _per_dollar(cluster: Cluster, kind: str) -> float:
    return cluster.supply(kind).accelerator.price / 3600


def _per_watt(cluster: Cluster, kind: str) -> float:
    return cluster.supply(kind).accelerator.watts


FEWEST = "fewest_gpus"
_COSTS: dict[str, Callable[[Cluster, str], float]] = {
    "goodput_per_gpu": _per_gpu,
    "per_dollar": _per_dollar,
    "per_watt": _per_watt,
    FEWEST: _per_gpu,
}
_UNITS = {
    "goodput_per_gpu": "requests/s per GPU",
    "per_dollar": "requests per dollar",
    "per_watt": "requests per joule",
    FEWEST: "1 / GPUs",
}
OBJECTIVES = tuple(_COSTS)
