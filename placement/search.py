"""The search: which placement scores best, what every other one reaches or at most could, and what was never tried and why.

Three rounds, each best first, each pruned by what is known so far:
1. Every kind of worker with one phase alone (`phases`).
2. Placements made of the best of them, and the colocated and chunked baseline of every kind of worker. Each is tried once at
   the rate at which it would match the best one known; only if it holds there is its goodput searched, with several seeds, in
   the joint simulation of the real lifecycle. The most promising of each family is always searched.
3. What the best ones do at their goodput, for the explanation.

Candidates are tried in waves of a fixed size, so that the result does not depend on how many processes work on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..core.slo import Slo
from ..core.view import Role
from .bounds import Lone, lone_attainment, lone_tpots, lone_ttfts, nearest_scale
from .candidates import affinities, mixed_candidates, rank, split_candidates, with_bound
from .executors import Executor
from .goodput import Goodput, together
from .objective import FEWEST
from .phases import Phases, bounded_phases, search_phases
from .problem import Candidate, Cell, NearSlo, Phase, Problem, SearchOptions, SearchResult, Status, Verdict
from .questions import Answer, Look, Question, answer, look
from .space import Affinity, CostMaker, Placement, WorkerKind, check_fit, fits, mixed_placements, split_placement, worker_kinds
from .trial import Case, cluster_setup


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is: `done` of about `total` candidates of this round, and the best so far (a name and its score)."""

    round: str
    done: int
    total: int
    best: str = ""


OnProgress = Callable[[Progress], None]
_GUESS = 0.93  # of the estimate: where the search for a goodput starts


def search(
    problem: Problem, cost: CostMaker, options: SearchOptions, executor: Executor, on_progress: OnProgress | None = None
) -> SearchResult:
    """The best placement of `problem`, and what is known of all others. Raises InvalidRequest when the model fits nowhere."""
    tell = on_progress or (lambda progress: None)
    kinds, unfit = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    check_fit(kinds, unfit, problem.cluster, problem.need)
    phases = bounded_phases(problem, kinds)
    num_simulations = search_phases(problem, phases, options, executor, lambda done, total: tell(Progress("phases", done, total)))
    race = _Race(problem, options, executor, tell)
    race.run(_candidates(problem, kinds, phases))
    verdicts = race.observed()
    best = max((verdict.score for verdict in verdicts if verdict.status is Status.SEARCHED), default=0.0)
    return SearchResult(
        problem,
        tuple(verdicts),
        tuple(phases.values()),
        tuple(_cells(problem, kinds, phases, verdicts)),
        tuple(unfit),
        num_simulations + race.num_simulations,
        None if best > 0 else nearest_slo(problem, kinds),
    )


def case_of(problem: Problem, placement: Placement, num_requests: int) -> Case:
    """A placement under the problem's demand."""
    setup = cluster_setup(placement, problem.cluster, problem.slo, problem.kv_bytes)
    return Case(setup, problem.demand, problem.slo, num_requests)


def nearest_slo(problem: Problem, kinds: list[WorkerKind]) -> NearSlo:
    """By how much objectives must be relaxed for an idle cluster to reach the attainment, and which one does: one of the two
    where that is enough, else both together."""
    pools = {kind.name: split_placement(kind, kind, (1, 1), Affinity.ANY, problem.budgets).pools for kind in kinds}
    ttfts = {name: lone_ttfts(prefill, problem.demand) for name, (prefill, _) in pools.items()}
    tpots = {name: lone_tpots(decode, problem.demand) for name, (_, decode) in pools.items()}
    found = []
    for prefill in kinds:
        tried = [
            (decode, split_placement(prefill, decode, (1, 1), affinity, problem.budgets))
            for decode in kinds
            for affinity in affinities(problem, prefill, decode)
        ]
        possible = [(decode, placement) for decode, placement in tried if fits(placement, problem.cluster)]
        for decode, placement in [*possible, (prefill, next(mixed_placements([prefill], problem.budgets)))]:
            alone = Lone(ttfts[prefill.name], tpots[decode.name])
            found.append((nearest_scale(alone, problem.slo), placement.num_devices, placement.name, placement, alone))
    scale, _, _, placement, alone = min(found, key=lambda entry: entry[:3])
    return NearSlo(_relaxed(problem.slo, scale, alone), scale, placement)


def _relaxed(slo: Slo, scale: float, alone: Lone) -> Slo:
    """Of the objectives no more than need be `scale` times as large for lone requests to reach the attainment."""
    both = replace(slo, ttft=slo.ttft * scale * (1 + 1e-9), tpot=slo.tpot * scale * (1 + 1e-9))
    for one in (replace(both, tpot=slo.tpot), replace(both, ttft=slo.ttft)):
        if lone_attainment(alone, one) >= slo.attainment - 1e-9:
            return one
    return both


def _candidates(problem: Problem, kinds: list[WorkerKind], phases: Phases) -> list[Candidate]:
    """All that are worth a simulation or a reason why not, the most promising first."""
    found = list(mixed_candidates(problem, kinds, phases))
    for prefill in phases.values():
        for decode in phases.values():
            if prefill.role is Role.PREFILL and decode.role is Role.DECODE and _usable(prefill) and _usable(decode):
                found += [with_bound(problem, candidate) for candidate in split_candidates(problem, prefill, decode)]
    return sorted(found, key=lambda candidate: rank(problem, candidate))


def _usable(phase: Phase) -> bool:
    """Worth a joint simulation: prefill kinds that were not searched were ruled out."""
    return phase.rate > 0 and (phase.goodput is not None or phase.role is Role.DECODE)


@dataclass(slots=True)
class _Race:
    """The second and third round: who is best so far, and what became of everybody."""

    problem: Problem
    options: SearchOptions
    executor: Executor
    tell: OnProgress
    verdicts: list[Verdict] = field(default_factory=list)
    num_simulations: int = 0

    def run(self, candidates: list[Candidate]) -> None:
        """Give every candidate its verdict."""
        waiting = [candidate for candidate in candidates if candidate.bound > 0]
        self.verdicts += [Verdict(candidate, Status.BOUNDED, 0.0) for candidate in candidates if candidate.bound <= 0]
        firsts = _first_of_each_family(waiting)
        self._try(firsts, None)
        waiting = [candidate for candidate in waiting if candidate not in firsts]
        while waiting := self._without_the_hopeless(waiting):
            wave, waiting = waiting[: self.options.wave], waiting[self.options.wave :]
            self._try(wave, self._score_to_match())
            done = len(self.verdicts)
            self.tell(Progress("placements", done, done + len(waiting), self._leader()))
        self._search_finalists()

    def observed(self) -> list[Verdict]:
        """All verdicts in order of score; the best, and the best of each family, with what they do at their goodput."""
        ordered = sorted(
            self.verdicts, key=lambda each: (not each.thorough, each.status is not Status.SEARCHED, *self._order(each))
        )
        searched = [verdict for verdict in ordered if verdict.goodput is not None and verdict.goodput.mean > 0]
        families = {verdict.placement.family: verdict for verdict in reversed(searched)}
        chosen = [verdict for verdict in searched if verdict is families[verdict.placement.family]]
        chosen += [verdict for verdict in searched if verdict not in chosen][: max(0, self.options.max_observed - len(chosen))]
        seed = self.options.goodput.seeds[0]
        looks = [Look(self._case(each.candidate), each.rate, seed) for each in chosen]
        seen = {id(each): observation for each, observation in zip(chosen, self.executor.map(look, looks), strict=True)}
        self.num_simulations += len(looks)
        return [replace(verdict, observation=seen.get(id(verdict))) for verdict in ordered]

    def _search_finalists(self) -> None:
        """Search the best ones thoroughly until the best of all has been: two at a time when they are close."""
        several = len(self.options.goodput.seeds) > 1
        for _ in range(self.options.max_finalists if several else 0):
            final = max((verdict.score for verdict in self.verdicts if verdict.thorough), default=0.0)
            rest = [verdict for verdict in self._searched() if not verdict.thorough and verdict.score > final]
            finalists = sorted(rest, key=self._order)[:2]
            if not finalists:
                return
            least = finalists[0].score * (1 - self.options.tie)
            self._search_thoroughly([verdict for verdict in finalists if verdict.score >= least])

    def _search_thoroughly(self, finalists: list[Verdict]) -> None:
        """Every seed of every finalist is a question of its own."""
        num_requests = self.options.patience * self.options.num_requests
        each_seed = [replace(self.options.goodput, seeds=(seed,)) for seed in self.options.goodput.seeds]
        questions = [
            Question(case_of(self.problem, each.placement, num_requests), each.rate, each.candidate.bound, once, near=True)
            for each in finalists
            for once in each_seed
        ]
        found = self.executor.map(answer, questions)
        self.num_simulations += sum(each.num_simulations for each in found)
        kept = []
        for number, verdict in enumerate(finalists):
            goodputs = [each.goodput for each in found[number * len(each_seed) :][: len(each_seed)] if each.goodput is not None]
            thorough = self._with(replace(verdict, thorough=True), together(goodputs))
            self.verdicts[self.verdicts.index(verdict)] = thorough
            kept.append(thorough.rate / verdict.rate)
        self._correct(max(kept))

    def _correct(self, kept: float) -> None:
        """Short streams flatter: of their goodput all others are believed to keep what the one kept that kept most."""
        for place, verdict in enumerate(self.verdicts):
            if verdict.goodput is not None and not verdict.thorough:
                self.verdicts[place] = self._with(verdict, verdict.goodput.times(kept))

    def _with(self, verdict: Verdict, goodput: Goodput) -> Verdict:
        known = replace(verdict, goodput=goodput)
        return replace(known, score=self.problem.objective.score(verdict.placement, known.rate))

    def _try(self, wave: list[Candidate], must_match: float | None) -> None:
        questions = [self._question(candidate, must_match) for candidate in wave]
        for candidate, found in zip(wave, self.executor.map(answer, questions), strict=True):
            self.num_simulations += found.num_simulations
            self.verdicts.append(self._verdict(candidate, found))

    def _question(self, candidate: Candidate, must_match: float | None) -> Question:
        rate = None if must_match is None else self.problem.objective.rate_to_beat(candidate.placement, must_match)
        first = replace(self.options.goodput, seeds=self.options.goodput.seeds[:1])
        return Question(self._case(candidate), max(_GUESS * candidate.estimate, 1e-6), candidate.bound, first, rate)

    def _verdict(self, candidate: Candidate, found: Answer) -> Verdict:
        placement, objective = candidate.placement, self.problem.objective
        if found.goodput is not None:
            return Verdict(candidate, Status.SEARCHED, objective.score(placement, found.goodput.mean), found.goodput, found.tried)
        failed_at = found.tried.rate if found.tried else candidate.bound
        return Verdict(candidate, Status.BEATEN, objective.score(placement, failed_at), tried=found.tried)

    def _without_the_hopeless(self, waiting: list[Candidate]) -> list[Candidate]:
        """Those that could still match the best; the others get their verdict."""
        least = self._score_to_match()
        left = []
        for candidate in waiting:
            bound = self.problem.objective.score(candidate.placement, candidate.bound)
            promise = self._promise(candidate)
            if least > 0 and bound < least:
                self.verdicts.append(Verdict(candidate, Status.BOUNDED, bound))
            elif least > 0 and promise < least:
                self.verdicts.append(Verdict(candidate, Status.PROMISED_LESS, promise))
            else:
                left.append(candidate)
        return left

    def _promise(self, candidate: Candidate) -> float:
        """The most that a candidate is believed to reach. Phases in one batch help each other: baselines have but their bound."""
        mixed = candidate.placement.affinity is Affinity.NONE
        most = candidate.bound if mixed else min(candidate.bound, candidate.estimate * (1 + self.options.slack))
        return self.problem.objective.score(candidate.placement, most)

    def _score_to_match(self) -> float:
        """Whoever reaches it may be a tie once all seeds have spoken."""
        best = self._best()
        if best is None:
            return 0.0
        return best.score if self.problem.objective.name == FEWEST else best.score * (1 - self.options.tie)

    def _searched(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.status is Status.SEARCHED and verdict.score > 0]

    def _best(self) -> Verdict | None:
        return min(self._searched(), key=self._order, default=None)

    def _leader(self) -> str:
        best = self._best()
        return f"{best.placement.name}: {best.score:.3g} {self.problem.objective.unit}" if best else ""

    def _order(self, verdict: Verdict) -> tuple[float, int, str]:
        return (-round(verdict.score, 12), verdict.placement.num_devices, verdict.placement.name)

    def _case(self, candidate: Candidate) -> Case:
        return case_of(self.problem, candidate.placement, self.options.num_requests)


def _first_of_each_family(candidates: list[Candidate]) -> list[Candidate]:
    firsts: dict[str, Candidate] = {}
    for candidate in candidates:
        firsts.setdefault(candidate.placement.family, candidate)
    return list(firsts.values())


def _cells(problem: Problem, kinds: list[WorkerKind], phases: Phases, verdicts: list[Verdict]) -> list[Cell]:
    """The heat map: for each pair of kinds the best verdict there is, else what the bounds of its phases allow."""
    found: dict[tuple[str, str], Verdict] = {}
    for verdict in reversed(verdicts):  # the best ones stand first
        if len(verdict.placement.pools) == 2:
            first, second = verdict.placement.pools
            found[first.kind.name, second.kind.name] = verdict
    cells = []
    for prefill in kinds:
        for decode in kinds:
            known = found.get((prefill.name, decode.name))
            if known is not None:
                cells.append(Cell(prefill.name, decode.name, known.score, known.status))
                continue
            pair = phases[Role.PREFILL, prefill.name], phases[Role.DECODE, decode.name]
            scores = [
                problem.objective.score(candidate.placement, candidate.estimate)
                for candidate in (split_candidates(problem, *pair) if min(phase.rate for phase in pair) > 0 else ())
            ]
            if scores:
                cells.append(Cell(prefill.name, decode.name, max(scores), Status.PROMISED_LESS))
    return cells
