"""The first round of a search: what each kind of worker does with one phase alone.

Instances of one phase do not depend on each other's number but for queueing, so that a few simulations per kind of worker
price all their combinations (DistServe, section 4). Only prefill needs them: it queues, while decode is a batch that breathes
around a mean which arithmetic finds. Kinds whose bound shows that no partner makes them good are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..core.view import Role
from .bounds import decode_bound, decode_estimate, lone_tpots, lone_ttfts, prefill_bound
from .candidates import affinities, split_candidates
from .executors import Executor
from .goodput import GoodputOptions
from .objective import FEWEST
from .problem import Phase, Problem, SearchOptions
from .questions import Question, answer
from .space import Affinity, Budgets, PoolChoice, WorkerKind, fits, split_placement
from .trial import prefill_alone

_GUESS = 0.7  # of the bound: where the search for a phase's goodput starts

Phases = dict[tuple[Role, str], Phase]
"""By role and the name of the kind."""


def bounded_phases(problem: Problem, kinds: Sequence[WorkerKind]) -> Phases:
    """Both phases of every kind, with their bounds alone. A kind on which lone requests miss has the bound 0."""
    phases: Phases = {}
    for kind in kinds:
        for role in (Role.PREFILL, Role.DECODE):
            phases[role, kind.name] = _bounded(problem, role, kind)
    return phases


def search_phases(
    problem: Problem, phases: Phases, options: SearchOptions, executor: Executor, tell: Callable[[int, int], None]
) -> int:
    """Find the goodput of the phases that matter, in place. Returns the number of simulations; `tell` hears how many are done
    of how many."""
    num_simulations = done = 0
    while wave := _next_wave(problem, phases, options):
        questions = [_question(problem, phase, options) for phase in wave]
        for phase, found in zip(wave, executor.map(answer, questions), strict=True):
            phases[phase.role, phase.kind.name] = replace(phase, goodput=found.goodput)
            num_simulations += found.num_simulations
        done += len(wave)
        tell(done, done + len(_worthwhile(problem, phases, options)))
    return num_simulations


def pool_of(role: Role, kind: WorkerKind, budgets: Budgets) -> PoolChoice:
    """One worker."""
    prefill, decode = split_placement(kind, kind, (1, 1), Affinity.ANY, budgets).pools
    return prefill if role is Role.PREFILL else decode


def _bounded(problem: Problem, role: Role, kind: WorkerKind) -> Phase:
    """Nothing at all when more lone requests than allowed miss the phase's objective."""
    pool = pool_of(role, kind, problem.budgets)
    slo, demand = problem.slo, problem.demand
    if role is Role.PREFILL:
        met = sum(ttft <= slo.ttft for ttft in lone_ttfts(pool, demand))
        bound = estimate = prefill_bound(pool, demand)
    else:
        met = sum(tpot is None or tpot <= slo.tpot for tpot in lone_tpots(pool, demand))
        bound = decode_bound(pool, demand, slo)
        estimate = min(bound, decode_estimate(pool, demand, slo))
    useful = met >= slo.attainment * len(demand.mix) - 1e-9
    return Phase(role, kind, bound, estimate) if useful else Phase(role, kind, 0.0, 0.0)


def _question(problem: Problem, phase: Phase, options: SearchOptions) -> Question:
    pool = pool_of(phase.role, phase.kind, problem.budgets)
    case = prefill_alone(pool, problem.cluster, problem.demand, problem.slo, options.num_requests)
    once = GoodputOptions(options.goodput.seeds[:1], options.phase_precision)
    return Question(case, _GUESS * phase.bound, phase.bound, once)


def _next_wave(problem: Problem, phases: Phases, options: SearchOptions) -> list[Phase]:
    return _worthwhile(problem, phases, options)[: options.wave]


def _worthwhile(problem: Problem, phases: Phases, options: SearchOptions) -> list[Phase]:
    """Phases not searched yet that could be part of something good, the most promising first."""
    known = _best_known(problem, phases)
    promising = []
    for phase in phases.values():
        if phase.role is Role.PREFILL and phase.goodput is None and phase.bound > 0:
            promise = max((_efficiency(problem, phase, other) for other in _partners(problem, phases, phase)), default=0.0)
            if promise > 0 and promise * (1 + options.slack) >= known:
                promising.append((-promise, phase.role, phase.kind.name, phase))
    return [phase for *_, phase in sorted(promising, key=lambda entry: entry[:3])]


def _partners(problem: Problem, phases: Phases, phase: Phase) -> list[Phase]:
    """Phases of the other role that fit beside it."""
    found = []
    for other in phases.values():
        if other.role is not phase.role and other.rate > 0:
            prefill, decode = (phase.kind, other.kind) if phase.role is Role.PREFILL else (other.kind, phase.kind)
            placements = (
                split_placement(prefill, decode, (1, 1), affinity, problem.budgets)
                for affinity in affinities(problem, prefill, decode)
            )
            if any(fits(placement, problem.cluster) for placement in placements):
                found.append(other)
    return found


def _efficiency(problem: Problem, phase: Phase, other: Phase) -> float:
    """Requests per unit of cost when both are used in the ideal proportion."""
    costs = (_cost(problem, each.kind) / each.rate for each in (phase, other))
    return 1 / sum(costs)


def _cost(problem: Problem, kind: WorkerKind) -> float:
    alone = split_placement(kind, kind, (1, 1), Affinity.ANY, problem.budgets)
    return problem.objective.cost(alone) / 2


def _best_known(problem: Problem, phases: Phases) -> float:
    """The efficiency of the best pair whose prefill has been searched, in a proportion that fits."""
    prefills = [phase for phase in phases.values() if phase.goodput is not None and phase.goodput.mean > 0]
    decodes = [phase for phase in phases.values() if phase.role is Role.DECODE and phase.rate > 0]
    best = 0.0
    for prefill in prefills:
        for decode in decodes:
            for candidate in split_candidates(problem, prefill, decode):
                rate = candidate.estimate
                if problem.objective.name == FEWEST:
                    rate = min(rate, problem.objective.rate or 0.0)
                best = max(best, rate / problem.objective.cost(candidate.placement))
    return best
