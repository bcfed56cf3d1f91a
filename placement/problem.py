"""What is searched for, and what a search says: frozen data alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ..core.slo import Slo
from ..core.view import Role
from .cluster import Cluster
from .demand import Demand
from .goodput import Goodput, GoodputOptions, Trial
from .objective import Objective
from .space import Budgets, Need, Placement, Unfit, WorkerKind
from .trial import Observation


@dataclass(frozen=True, slots=True)
class Problem:
    """A model, the hardware it may use, what will be asked of it, and what counts as good."""

    need: Need
    cluster: Cluster
    demand: Demand
    slo: Slo
    objective: Objective
    budgets: Budgets = Budgets()

    @property
    def kv_bytes(self) -> float:
        """KV of one token, all layers and heads."""
        return self.need.model.kv_bytes_per_token(self.need.dtype)


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How thorough a search is.

    num_requests  counted requests of one simulation
    goodput       seeds and precision of a candidate's goodput; a phase alone takes the first seed and `phase_precision`
    slack         by how much a joint simulation may surpass what its phases promise alone (a pool of several workers queues
                  less than one): candidates whose promise is further below the best are not simulated
    tie           candidates are given up that do not come so near the best with the first seed
    max_finalists how often the best, and a rival that is close, are searched again, thoroughly: with all seeds, and streams
                  `patience` times as long, in which what is slightly too much for a cluster has time to show
    wave          candidates tried between two looks at what is best
    max_observed  candidates of which is kept what they did at their goodput
    """

    num_requests: int = 300
    goodput: GoodputOptions = GoodputOptions()
    phase_precision: float = 0.06
    tie: float = 0.03
    max_finalists: int = 3
    patience: int = 4
    slack: float = 0.2
    wave: int = 4
    max_observed: int = 8


class Status(StrEnum):
    """What is known of a candidate."""

    SEARCHED = "searched"  # its goodput was found
    BEATEN = "beaten"  # missed the objectives at the rate at which it would match the best
    PROMISED_LESS = "promised less"  # its phases alone promise too little
    BOUNDED = "bounded"  # no schedule could make it match the best


@dataclass(frozen=True, slots=True)
class Phase:
    """A kind of worker that does one phase alone, in requests/s: what it can't surpass, what arithmetic makes one expect, and
    what simulations found (None for decode, where the arithmetic is near, and for what the bound ruled out)."""

    role: Role
    kind: WorkerKind
    bound: float
    estimate: float
    goodput: Goodput | None = None

    @property
    def rate(self) -> float:
        """The best knowledge of what it can do."""
        return self.estimate if self.goodput is None else self.goodput.mean


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement before it is simulated. Both in requests/s: no schedule can surpass `bound`; `estimate` is what its phases
    promise."""

    placement: Placement
    bound: float
    estimate: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A placement and what the search found out about it.

    goodput   None unless SEARCHED; when not `thorough`, less by what longer streams took from those that are
    score     by the objective: of `rate`, else the most that it could reach as far as is known
    tried     the one trial that a BEATEN candidate failed
    thorough  whether the goodput is that of longer streams and several seeds
    """

    candidate: Candidate
    status: Status
    score: float
    goodput: Goodput | None = None
    tried: Trial | None = None
    observation: Observation | None = None
    thorough: bool = False

    @property
    def placement(self) -> Placement:
        return self.candidate.placement

    @property
    def rate(self) -> float:
        """Its goodput, 0 when none was searched. Of a thorough one the least of any seed: a cluster at its limit fails in the
        worst stretch of its traffic, and a long stream has one. The mean of short streams promises some percent too much."""
        if self.goodput is None:
            return 0.0
        return self.goodput.low if self.thorough else self.goodput.mean


@dataclass(frozen=True, slots=True)
class Cell:
    """The best score known of a prefill kind (row) with a decode kind (column); `status` says how well it is known."""

    prefill: str
    decode: str
    score: float
    status: Status


@dataclass(frozen=True, slots=True)
class NearSlo:
    """The objectives that come nearest to those asked for and can be reached, and by what."""

    slo: Slo
    scale: float
    placement: Placement


@dataclass(frozen=True, slots=True)
class SearchResult:
    """verdicts are in order of score: first those searched thoroughly, then the searched, then the others. best is None when
    nothing reaches the objectives at any rate (then `nearest` says what could be reached); ties are those whose interval meets
    the best one's."""

    problem: Problem
    verdicts: tuple[Verdict, ...]
    phases: tuple[Phase, ...]
    cells: tuple[Cell, ...]
    unfit: tuple[Unfit, ...]
    num_simulations: int
    nearest: NearSlo | None = None

    @property
    def searched(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.status is Status.SEARCHED)

    @property
    def best(self) -> Verdict | None:
        return next((verdict for verdict in self.searched if verdict.score > 0), None)

    @property
    def ties(self) -> tuple[Verdict, ...]:
        best = self.best
        if best is None:
            return ()
        least = score_interval(self.problem.objective, best)[0]
        return tuple(
            other
            for other in self.searched
            if other is not best and score_interval(self.problem.objective, other)[1] >= least > 0
        )


def score_interval(objective: Objective, verdict: Verdict) -> tuple[float, float]:
    """The scores of the least and the largest goodput of any seed."""
    goodput = verdict.goodput
    if goodput is None:
        return 0.0, verdict.score
    return objective.score(verdict.placement, goodput.low), objective.score(verdict.placement, goodput.high)
