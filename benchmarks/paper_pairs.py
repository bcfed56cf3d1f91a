"""DistServe's placements among what its own search chooses from: one prefill and one decode worker on a node of eight A100.

The paper's Algorithm 2 never looks at more workers of a kind than that; it places the pair again and again. Under four
conditions, each on top of the one before:

published   step times as DistServe's simulator has them: a stage costs 1/PP of everything, the host works before the first alone
stages      each stage pays for itself: what a decode step takes beyond streaming weights (at the share of bandwidth that products
            reach on A100) is launched in every stage, the host's 2 ms are spent in every stage, activations are handed on
alone       a prefill step holds one prompt: the paper batches prompts up to the length that saturates the GPU, a few hundred
            tokens, and runs longer ones by themselves
unlimited   KV memory does not bind: DistServe's simulator has no limit of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from baton.placement.distserve import DistServeCost, Triple
from baton.placement.efficiency import efficiency_of
from baton.placement.executors import Executor, executor
from baton.placement.goodput import GoodputOptions
from baton.placement.hardware import Accelerator
from baton.placement.phases import bounded_phases
from baton.placement.problem import Problem
from baton.placement.questions import Question, answer
from baton.placement.search import case_of
from baton.placement.space import Affinity, CostMaker, Placement, Price, split_placement, worker_kinds
from paper_placements import Paper, cost_maker, problem_of, read_papers

CONDITIONS = ("published", "stages", "alone", "unlimited")
NODE = 8
HANDED_ON = 5e-5  # seconds of 11 MB over NVLink, a prompt of 1,100 tokens; 0.02 ms up to 1.5 MB (vidur's a100_dgx/send_recv.csv)
PLENTY = 100  # times the KV blocks that there are
Degrees = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Goodput per GPU of every pair, by the degrees (TP, PP) of its prefill and of its decode worker."""

    paper: Paper
    condition: str
    found: Mapping[tuple[Degrees, Degrees], float]

    @property
    def best(self) -> tuple[Degrees, Degrees]:
        return max(self.found, key=lambda pair: self.found[pair])

    @property
    def papers(self) -> float:
        return self.found[self.paper.prefill, self.paper.decode]


def report(data: Path, quick: bool) -> dict[str, float]:
    """Both models (quick: the smaller one under the last condition) as a table, and the figures for the last line."""
    figures: dict[str, float] = {}
    print("| model | condition | the paper's pair, req/s per GPU | best pair | share of it |\n|---|---|---|---|---|", flush=True)
    with executor(1 if quick else 2) as runner:
        for paper in read_papers(data)[: 1 if quick else None]:
            for condition in CONDITIONS[-1:] if quick else CONDITIONS:
                pairs = examine(paper, data, condition, 60 if quick else 200, runner)
                best = pairs.found[pairs.best]
                share = pairs.papers / best
                cells = (paper.model, condition, f"{pairs.papers:.2f}", f"{_name(pairs.best)}: {best:.2f}", f"{share:.0%}")
                print(f"| {' | '.join(cells)} |", flush=True)
                figures[f"{paper.model}_of_best_pair_{condition}"] = round(share, 3)
    return figures


def examine(paper: Paper, data: Path, condition: str, num_requests: int, runner: Executor) -> Pairs:
    """The goodput of every pair that fits a node."""
    problem = problem_of(paper)
    placements = list(pairs_of(paper, problem, data, condition))
    options = GoodputOptions((0,), 0.04)
    questions = [
        Question(
            case_of(problem, placement, num_requests),
            min(most, paper.distserve * placement.num_devices),
            most,  # a short run may exceed what lasts: memory takes a while to fill
            options,
        )
        for placement, most in zip(placements, _bounds(placements, problem), strict=True)
    ]
    found = {}
    for placement, result in zip(placements, runner.map(answer, questions), strict=True):
        prefill, decode = (pool.kind for pool in placement.pools)
        goodput = result.goodput.mean if result.goodput else 0.0
        found[(prefill.tp, prefill.pp), (decode.tp, decode.pp)] = goodput / placement.num_devices
    return Pairs(paper, condition, found)


def pairs_of(paper: Paper, problem: Problem, data: Path, condition: str) -> Iterator[Placement]:
    """All pairs of workers that fit a node, under a condition."""
    published = cost_maker(data, "distserve", paper.model)
    cost = published if condition == "published" else _with_stages(published, problem)
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost)
    if condition == "unlimited":
        kinds = [replace(kind, num_blocks=kind.num_blocks * PLENTY) for kind in kinds]
    for prefill in kinds:
        for decode in kinds:
            if prefill.num_devices + decode.num_devices <= NODE:
                placement = split_placement(prefill, decode, (1, 1), Affinity.NODE, problem.budgets)
                first, second = placement.pools
                alone = condition in ("alone", "unlimited")
                yield replace(placement, pools=(replace(first, max_num_seqs=1), second)) if alone else placement


def _bounds(placements: list[Placement], problem: Problem) -> Iterator[float]:
    """The rate that no pair of such workers can pass for long."""
    kinds = {pool.kind.name: pool.kind for placement in placements for pool in placement.pools}
    phases = bounded_phases(problem, list(kinds.values()))
    for placement in placements:
        yield min(phases[pool.role, pool.kind.name].rate for pool in placement.pools)


def _with_stages(published: CostMaker, problem: Problem) -> CostMaker:
    """Of `published`, with pipelines whose stages pay for themselves."""

    def cost(device: Accelerator, tp: int, pp: int) -> Price | None:
        single = published(device, tp, 1)
        if single is None or pp == 1 or not isinstance(single.cost, DistServeCost):
            return single
        bandwidth = device.bandwidth * efficiency_of(device.family).gemm_bytes
        streaming = problem.need.model.weight_bytes("float16") / tp / bandwidth
        measured = single.cost
        return Price(
            replace(
                measured,
                small_decode=_in_every_stage(measured.small_decode, streaming, pp),
                large_decode=_in_every_stage(measured.large_decode, streaming, pp),
                stages=pp,
                host=(measured.host + HANDED_ON) * pp,
            )
        )

    return cost


def _in_every_stage(triple: Triple, streaming: float, stages: int) -> Triple:
    """The constant part: what streams weights is divided by the stages, the rest is not."""
    constant, per_token, per_row = triple
    rest = max(0.0, constant - streaming)
    return constant - rest + rest * stages, per_token, per_row


def _name(pair: tuple[Degrees, Degrees]) -> str:
    return " + ".join(f"TP{tp} PP{pp}" for tp, pp in pair)
