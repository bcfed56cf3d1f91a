"""What a running cluster saw, as the search takes it: a demand with its rate, and the cost of steps of any parallelism.

Pure: whoever asked the cluster (`deploy.observe`) brings what it said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..core.errors import Unavailable
from ..core.observed import ObservedRequest, ObservedStep
from ..core.shape import StepShape
from ..core.slo import Slo
from ..simulator.cost import LinearCost
from .demand import Demand, demand_of
from .fit import Measurement, fit_cost, residuals
from .hardware import Accelerator
from .model_shape import ModelShape
from .roofline import RooflineCost, roofline_cost

MIN_REQUESTS = 100
"""Requests that ended well: with fewer, lengths and gaps are anybody's guess."""
MIN_STEPS = 16
"""Steps of a kind (with a prompt in them, or without) below which they say nothing."""
PAUSE, MANY_GAPS = 60.0, 50
"""A gap of so many seconds and so many typical gaps: what came before it was another workload."""
PRIOR_ERROR = 0.2
"""Relative error of the roofline's step times: what docs/fidelity.md finds for rows that it was not fitted to, rounded up."""
_LEAST_CV, _LARGEST_CV = 0.1, 8.0
_FAINT = 0.05  # weight of an error of what was not observed
_LARGE_RESIDUAL = 4.0  # times the median residual: the host did something else during that step


@dataclass(frozen=True, slots=True)
class Workload:
    """What was asked of the cluster since the last pause, and how it fared.

    rate         sequences/s over `seconds`
    cached       share of the prompts' tokens that were found in a prefix cache
    attainment   of all requests, those refused among them, by the objectives it is compared with
    ttft, tpot   medians of those that ended well, seconds; None where there are none
    since_last   seconds between the last request and the moment of asking
    """

    demand: Demand
    rate: float
    seconds: float
    num_requests: int
    cached: float
    attainment: float
    ttft: float | None
    tpot: float | None
    since_last: float


def workload_of(requests: Sequence[ObservedRequest], slo: Slo) -> Workload:
    """Raises Unavailable, saying how much is needed, when too little was observed."""
    latest = _since_last_pause(sorted(requests, key=lambda request: request.arrival))
    ended = [request for request in latest if request.ok and request.output_tokens > 0]
    if len(ended) < MIN_REQUESTS:
        before = f" since its last pause ({len(requests)} before and after it)" if len(latest) < len(requests) else ""
        raise Unavailable(
            f"the cluster has ended {len(ended)} requests well{before}; at least {MIN_REQUESTS} are needed to know its workload: "
            "let it serve on, and ask again"
        )
    arrivals = sorted({request.arrival for request in latest})
    seconds = arrivals[-1] - arrivals[0]
    if seconds <= 0:
        raise Unavailable(f"all {len(latest)} requests came at the same moment: a rate needs several")
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    spread = statistics.pstdev(gaps) / statistics.fmean(gaps)
    tpots = [request.tpot for request in ended if request.tpot is not None]
    ttfts = [request.ttft for request in ended if request.ttft is not None]
    return Workload(
        demand=demand_of(
            ((request.input_tokens, request.output_tokens) for request in ended), min(max(spread, _LEAST_CV), _LARGEST_CV)
        ),
        rate=len(latest) * (len(arrivals) - 1) / len(arrivals) / seconds,
        seconds=seconds,
        num_requests=len(latest),
        cached=sum(request.cached_tokens for request in ended) / sum(request.input_tokens for request in ended),
        attainment=sum(_met(request, slo) for request in latest) / len(latest),
        ttft=statistics.median(ttfts) if ttfts else None,
        tpot=statistics.median(tpots) if tpots else None,
        since_last=-arrivals[-1],
    )


def _since_last_pause(requests: Sequence[ObservedRequest]) -> Sequence[ObservedRequest]:
    """`requests` in order of arrival."""
    gaps = [later.arrival - earlier.arrival for earlier, later in pairwise(requests)]
    longest = max(PAUSE, MANY_GAPS * statistics.median(gaps)) if gaps else PAUSE
    pauses = [number for number, gap in enumerate(gaps, start=1) if gap > longest]
    return requests[pauses[-1] :] if pauses else requests


def _met(request: ObservedRequest, slo: Slo) -> bool:
    return request.ok and request.ttft is not None and slo.met_by(request.ttft, request.tpot)


# ---- step times ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Build:
    """A way to build a worker. `device` is what one rank runs on: of a CPU, its threads."""

    device: Accelerator
    tp: int
    pp: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.device.name, self.tp, self.pp


@dataclass(frozen=True, slots=True)
class ObservedCost:
    """error is relative: the median residual of a fit, or `PRIOR_ERROR` where some kind of step was never seen so."""

    cost: LinearCost
    overhead: float
    num_steps: int
    error: float


class StepTimesSeen:
    """Costs of any build, from the steps that were observed of some.

    A sample of steps has the sizes that the traffic made. So every fit also takes in the roofline's times of sizes all over the
    range, scaled to what was observed: so faint that they decide nothing but what the observed steps leave open. A build of
    which a kind of step was never seen has the scale of the others.
    """

    def __init__(self, model: ModelShape, dtype: str, steps: Mapping[Build, Sequence[ObservedStep]]) -> None:
        """Raises Unavailable, saying how much is needed, when there are too few steps with prompts or too few without."""
        self._model = model
        self._dtype = dtype
        self._steps = {build.key: [_per_stage(step, build.pp) for step in seen] for build, seen in steps.items()}
        self._overhead = 0.0
        ratios: dict[bool, list[float]] = {True: [], False: []}
        for build, seen in steps.items():
            prior = self._prior(build)
            for step in self._steps[build.key]:
                ratios[_prefills(step.shape)].append(step.seconds / prior.seconds(step.shape))
            if seen:
                self._overhead = max(self._overhead, statistics.median(step.period - step.seconds for step in seen))
        for prefills, what in ((True, "steps with prompts"), (False, "steps that only decode")):
            if len(ratios[prefills]) < MIN_STEPS:
                raise Unavailable(
                    f"the cluster remembers {len(ratios[prefills])} {what}; at least {MIN_STEPS} are needed to know their cost: "
                    "let it serve on, and ask again"
                )
        self._scale = {prefills: statistics.median(found) for prefills, found in ratios.items()}

    def cost(self, build: Build) -> ObservedCost:
        """Raises InvalidRequest when the model cannot be split so."""
        seen = self._steps.get(build.key, [])
        both = all(sum(_prefills(step.shape) is kind for step in seen) >= MIN_STEPS for kind in (True, False))
        measured = [Measurement(step.shape, step.seconds) for step in seen]
        anchors = self._anchors(build)
        fitted = fit_cost([*measured, *anchors], build.pp)
        if measured:
            kept = _without_outliers(fitted, measured)
            fitted = fit_cost([*kept, *anchors], build.pp)
            error = max(each.median for each in residuals(fitted, measured).values())
        else:
            error = 0.0
        return ObservedCost(fitted, self._overhead, len(seen), error if both else max(error, PRIOR_ERROR))

    def _anchors(self, build: Build) -> list[Measurement]:
        prior = self._prior(build)
        return [Measurement(shape, self._scale[_prefills(shape)] * prior.seconds(shape), _FAINT) for shape in _ANCHORS]

    def _prior(self, build: Build) -> RooflineCost:
        return roofline_cost(self._model, build.device, build.tp, build.pp, self._dtype, self._dtype)


def _per_stage(step: ObservedStep, stages: int) -> ObservedStep:
    """A worker sees its pipeline as a whole; costs are those of one stage."""
    return step if stages == 1 else ObservedStep(step.shape, step.seconds / stages, step.period / stages)


def _prefills(shape: StepShape) -> bool:
    return shape.prefill_rows > 0


def _without_outliers(cost: LinearCost, measured: Sequence[Measurement]) -> list[Measurement]:
    errors = [abs(cost.seconds(each.shape) / each.seconds - 1) for each in measured]
    most = max(0.25, _LARGE_RESIDUAL * statistics.median(errors))
    return [each for each, error in zip(measured, errors, strict=True) if error <= most]


def _whole_prompts(rows: int, tokens: int) -> StepShape:
    return StepShape(rows, rows * tokens, rows * tokens * (tokens + 1) // 2, rows * tokens, sampled=rows)


_ANCHORS = (
    *(_whole_prompts(1, tokens) for tokens in (16, 64, 256, 1024, 2048)),
    *(
        StepShape(decode_rows=rows, decode_context=rows * context, sampled=rows)
        for rows in (1, 4, 16, 64)
        for context in (64, 1024)
    ),
)
