"""Why the winner won: how everybody's attainment falls with the rate, why the rivals lost, at which link bandwidth another
one would win, and what the whole deployment does at its rate.

Takes a finished search; simulates a little more, at rates that the search had no need for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..core.view import Role
from .candidates import rank, split_candidates
from .deployment import Deployment, deployment_of
from .executors import Executor
from .goodput import Trial
from .problem import Problem, SearchOptions, SearchResult, Status, Verdict
from .questions import Attempt, Question, answer, attempt
from .search import case_of
from .space import Affinity, Placement
from .trial import Case

CURVE_SHARES = (0.35, 0.6, 0.8, 0.9, 1.0, 1.1, 1.25)
"""Of its goodput: the rates at which a placement's attainment is drawn."""
_STEP = 4.0  # from one bandwidth to the next until the winner changes
_MAX_STEPS = 9
_PRECISION = 1.1
_MAX_SCALE = 6  # a whole deployment is simulated with up to so many times the requests of one copy


@dataclass(frozen=True, slots=True)
class Curve:
    """Attainment (the mean over `rate`'s trials) against requests/s of one placement."""

    placement: Placement
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class LinkSwitch:
    """At which bandwidth another placement wins.

    link       `network` (between nodes) or `node link`
    now        bytes/s of the cluster that was searched; `bandwidth` is where the winner changes, None when nowhere
    winner, rival   who wins now, and on the other side
    tied       at the present bandwidth the two are as good as each other, so that no bandwidth can be named
    """

    link: str
    now: float
    bandwidth: float | None
    winner: Placement
    rival: Placement
    tied: bool = False

    def __str__(self) -> str:
        what = f"the {self.link} ({bytes_per_second(self.now)} now)"
        if self.tied:
            return f"at {bytes_per_second(self.now)} of the {self.link} {self.rival.name} is about as good"
        if self.bandwidth is None:
            return f"no bandwidth of {what} makes {self.rival.name} win"
        direction = "below" if self.bandwidth < self.now else "above"
        return f"{direction} {bytes_per_second(self.bandwidth)} of {what}, {self.rival.name} wins"


@dataclass(frozen=True, slots=True)
class Loss:
    """A placement that did not win, and why, in words."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """deployed_attainment is that of one whole cluster of the deployment at its share of the rate, one per seed."""

    curves: tuple[Curve, ...]
    losses: tuple[Loss, ...]
    link: LinkSwitch | None
    deployment: Deployment
    deployed_attainment: tuple[float, ...]


def explain(result: SearchResult, options: SearchOptions, executor: Executor) -> Explanation | None:
    """None when nothing won."""
    best = result.best
    if best is None:
        return None
    deployment = deployment_of(result.problem, best)
    shown = _family_bests(result)
    questions = [question for verdict in shown for question in _curve_questions(result.problem, verdict, options)]
    deployed = _deployed_questions(result.problem, deployment, options)
    trials = executor.map(attempt, [*questions, *deployed])
    return Explanation(
        curves=tuple(_curve(verdict, trials[number * len(CURVE_SHARES) :]) for number, verdict in enumerate(shown)),
        losses=tuple(Loss(verdict, why_lost(result, verdict)) for verdict in result.verdicts if verdict is not best),
        link=link_switch(result, options, executor),
        deployment=deployment,
        deployed_attainment=tuple(trial.attainment for trial in trials[len(questions) :]),
    )


def why_lost(result: SearchResult, verdict: Verdict) -> str:
    """In a line."""
    objective, best = result.problem.objective, result.best
    unit = objective.unit
    if verdict.status is Status.SEARCHED:
        if verdict.score <= 0:
            useless = verdict.goodput is None or verdict.goodput.mean == 0
            return "reaches the attainment at no rate" if useless else "falls short of the rate"
        behind = "" if best is None else f"{1 - verdict.score / best.score:.0%} behind"
        tie = "; a tie: the intervals meet" if verdict in result.ties else ""
        return behind + tie + (f"; {binding(verdict)}" if verdict.observation else "")
    if verdict.status is Status.BEATEN and verdict.tried is not None:
        return f"misses the objectives at {verdict.tried.rate:.3g} requests/s, where it would match the best"
    if verdict.status is Status.PROMISED_LESS:
        return f"its phases alone promise {verdict.score:.3g} {unit} at most"
    if verdict.candidate.bound <= 0:
        return "requests miss the objectives even when they are alone"
    return f"no schedule can exceed {verdict.score:.3g} {unit}"


def binding(verdict: Verdict) -> str:
    """What binds a placement at its goodput, with the number behind it."""
    if verdict.observation is None:
        return "not observed"
    bottleneck = verdict.observation.report.bottleneck
    nearest = bottleneck.pressures[0] if bottleneck.pressures else None
    return f"{bottleneck.resource}: {nearest.why}" if nearest is not None and not bottleneck.binding else bottleneck.why


def link_switch(result: SearchResult, options: SearchOptions, executor: Executor) -> LinkSwitch | None:
    """Bisect the bandwidth between the winner and the best rival that uses the link otherwise. None without such a rival.

    A winner whose KV crosses the link is pitted against the best that does not need it; any other winner against the
    placement across the link that promises most with a link without limit. Both are tried alike, with the same requests: the
    goodput of the one that does not use the link is the rate that the other must carry.
    """
    problem, best = result.problem, result.best
    if best is None:
        return None
    link = "node link" if _one_node(problem, best.placement) else "network"
    used = _uses(best.placement, link)
    rival = _best_without(result, link) if used else _unlimited_rival(result, link)
    if rival is None:
        return None
    user, other = (best.placement, rival) if used else (rival, best.placement)
    seeds = options.goodput.seeds
    guess = problem.objective.rate_to_beat(other, best.score) if math.isfinite(best.score) else 1.0
    question = Question(case_of(problem, other, options.num_requests), guess, math.inf, options.goodput)
    goodput = executor.map(answer, [question])[0].goodput
    rate = problem.objective.rate_to_beat(user, problem.objective.score(other, goodput.mean if goodput else 0.0))
    fabric = problem.cluster.supply(user.pools[0].kind.accelerator).fabric
    now = fabric.node_link if link == "node link" else fabric.network

    def carried(bandwidth: float) -> bool:
        """With most seeds."""
        case = _at(problem, user, link, bandwidth, options.num_requests)
        trials = executor.map(attempt, [Attempt(case, rate, seed, complete=False) for seed in seeds])
        return 2 * sum(trial.met for trial in trials) > len(trials)

    if not (math.isfinite(now) and 0 < rate < math.inf):
        return None
    bandwidth, tied = find_switch(carried, now, used)
    return LinkSwitch(link, now, bandwidth, best.placement, rival, tied)


def find_switch(carried: Callable[[float], bool], now: float, wins: bool) -> tuple[float | None, bool]:
    """The bandwidth at which whoever uses the link begins to win, and whether both are as good at the bandwidth there is `now`.

    `wins`: the search found that the user of the link wins now. When `carried` (does it carry what the other does at this
    bandwidth?) says otherwise, the two are closer than simulations can tell, and no bandwidth near `now` means anything.
    """
    if carried(now) is not wins:
        return None, True
    if not wins and not carried(now * _STEP**_MAX_STEPS):
        return None, False
    return _switch(carried, now, wins), False


def _best_without(result: SearchResult, link: str) -> Placement | None:
    """The best searched placement that does not need the link."""
    return next((each.placement for each in result.searched if each.score > 0 and not _uses(each.placement, link)), None)


def _unlimited_rival(result: SearchResult, link: str) -> Placement | None:
    """The most promising placement over a link that takes no time."""
    free = result.problem.cluster.with_link(**{"node_link" if link == "node link" else "network": 1e30})
    problem = replace(result.problem, cluster=free)
    candidates = [
        candidate
        for prefill in result.phases
        for decode in result.phases
        if prefill.role is Role.PREFILL and decode.role is Role.DECODE and min(prefill.rate, decode.rate) > 0
        for candidate in split_candidates(problem, prefill, decode)
        if _uses(candidate.placement, link)
    ]
    return min(candidates, key=lambda candidate: rank(problem, candidate)).placement if candidates else None


def bytes_per_second(rate: float) -> str:
    """Three digits with a unit."""
    for unit, size in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} B/s"


def _family_bests(result: SearchResult) -> list[Verdict]:
    """The best searched placement of each family, the winner first."""
    families: dict[str, Verdict] = {}
    for verdict in result.searched:
        if verdict.score > 0:
            families.setdefault(verdict.placement.family, verdict)
    return list(families.values())


def _curve_questions(problem: Problem, verdict: Verdict, options: SearchOptions) -> list[Attempt]:
    case = case_of(problem, verdict.placement, options.num_requests)
    goodput = verdict.goodput.mean if verdict.goodput else 0.0
    return [Attempt(case, share * goodput, options.goodput.seeds[0]) for share in CURVE_SHARES]


def _curve(verdict: Verdict, trials: Sequence[Trial]) -> Curve:
    return Curve(verdict.placement, tuple((trial.rate, trial.attainment) for trial in trials[: len(CURVE_SHARES)]))


def _deployed_questions(problem: Problem, deployment: Deployment, options: SearchOptions) -> list[Attempt]:
    """One whole cluster at its share of the rate, with requests enough that each copy sees its part of them."""
    if deployment.copies == 1:
        return []
    num_requests = options.num_requests * min(deployment.copies, _MAX_SCALE)
    case = case_of(problem, deployment.cluster_placement, num_requests)
    rate = deployment.rate if deployment.wanted is None else min(deployment.rate, deployment.wanted)
    return [Attempt(case, rate / deployment.num_clusters, seed) for seed in options.goodput.seeds]


def _one_node(problem: Problem, placement: Placement) -> bool:
    return problem.cluster.supply(placement.pools[0].kind.accelerator).num_nodes == 1


def _uses(placement: Placement, link: str) -> bool:
    return placement.affinity is (Affinity.ANY if link == "network" else Affinity.NODE)


def _at(problem: Problem, placement: Placement, link: str, bandwidth: float, num_requests: int) -> Case:
    cluster = problem.cluster
    joined = cluster.with_link(network=bandwidth) if link == "network" else cluster.with_link(node_link=bandwidth)
    return case_of(replace(problem, cluster=joined), placement, num_requests)


def _switch(carried: Callable[[float], bool], now: float, holds: bool) -> float | None:
    """The bandwidth at which `carried` changes from what it is now (`holds`): from there by large steps, then halving."""
    inside = now
    for _ in range(_MAX_STEPS):
        outside = inside / _STEP if holds else inside * _STEP
        if carried(outside) is not holds:
            break
        inside = outside
    else:
        return None
    while max(inside, outside) / min(inside, outside) > _PRECISION:
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if carried(middle) is holds else (inside, middle)
    return math.sqrt(inside * outside)
