"""DistServe's placements of OPT-13B and OPT-66B against the best that the search finds, and against colocated vLLM.

One node of eight A100-80GB with NVLink, the step times that DistServe measured on that GPU, lengths like ShareGPT's, the
objectives of its Table 1. A degree of tensor parallelism that was not measured is out of the race. Colocated vLLM is what the
paper compares with: OPT-13B on one GPU, OPT-66B on four; a step prefills or decodes, prompts first, times as measured of vLLM.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

from baton.core.errors import InvalidRequest
from baton.core.slo import Slo
from baton.placement.cluster import Cluster, Shape, parse_cluster
from baton.placement.demand import Demand, demand_of
from baton.placement.distserve import HOST_SECONDS, read_distserve
from baton.placement.executors import Executor, executor
from baton.placement.goodput import Goodput, GoodputOptions, find_goodput
from baton.placement.hardware import Accelerator
from baton.placement.model_shape import find_model
from baton.placement.objective import objective
from baton.placement.problem import Problem, SearchOptions, Verdict
from baton.placement.search import case_of, search
from baton.placement.space import (
    Affinity,
    CostMaker,
    Need,
    Price,
    WorkerKind,
    mixed_placements,
    split_placement,
    worker_kinds,
)
from baton.placement.trial import Case, Trial, try_rate
from baton.simulator.workload.published import SHAREGPT

VLLM_TP = {"opt-13b": 1, "opt-66b": 4}


@dataclass(frozen=True, slots=True)
class Paper:
    """One row of the published table. Goodput in requests/s per GPU at 90% attainment."""

    model: str
    prefill: tuple[int, int]
    decode: tuple[int, int]
    slo: Slo
    distserve: float
    vllm: float


@dataclass(frozen=True, slots=True)
class Found:
    """Goodput per GPU of the paper's placement and of colocated vLLM; the best found of those with prefill and decode apart (all
    that the paper searches) and of all; `curve` is (requests/s per GPU, attainment of the paper's placement, of vLLM)."""

    paper: Paper
    placement: float
    best_apart: Verdict
    best: Verdict
    vllm: float
    curve: tuple[tuple[float, float, float], ...]


def report(data: Path, quick: bool) -> dict[str, float]:
    """Both models (quick: the smaller one) as tables, and the figures for the last line."""
    figures: dict[str, float] = {}
    found = []
    with executor(1 if quick else 2) as runner:
        for paper in read_papers(data)[: 1 if quick else None]:
            found.append(examine(paper, data, 120 if quick else 200, runner))
            figures[f"{paper.model}_of_best"] = round(found[-1].placement / found[-1].best_apart.score, 3)
            figures[f"{paper.model}_over_vllm"] = round(found[-1].placement / found[-1].vllm, 2)
    print(table(found))
    return figures


def read_papers(data: Path) -> list[Paper]:
    with (data / "derived" / "distserve_placements_table.csv").open(encoding="utf-8", newline="") as file:
        return [
            Paper(
                row["model"],
                (int(row["prefill_tp"]), int(row["prefill_pp"])),
                (int(row["decode_tp"]), int(row["decode_pp"])),
                Slo(float(row["ttft_slo_s"]), float(row["tpot_slo_s"]), 0.9),
                float(row["goodput90_distserve_req_s_gpu"]),
                float(row["goodput90_vllm_req_s_gpu"]),
            )
            for row in csv.DictReader(file)
        ]


def examine(paper: Paper, data: Path, num_requests: int, runner: Executor) -> Found:
    """Search the whole space, and the two placements of the paper."""
    problem = problem_of(paper)
    options = SearchOptions(num_requests=num_requests, goodput=GoodputOptions((0,), 0.04))
    result = search(problem, cost_maker(data, "distserve", paper.model), options, runner)
    best = result.best
    if best is None or best.goodput is None:
        raise RuntimeError(f"{paper.model}: no placement reaches {paper.slo}")
    split, colocated = paper_case(paper, problem, data, num_requests), vllm_case(paper, problem, data, num_requests)
    goodput = _goodput(split, best.goodput.mean, options)
    baseline = _goodput(colocated, best.goodput.mean / 4, options)
    gpus, vllm_gpus = _num_gpus(paper), VLLM_TP[paper.model]
    rates = [share * goodput.mean / gpus for share in (0.25, 0.5, 0.75, 1.0, 1.25)]
    curve = [
        (rate, _attainment(split, rate * gpus).attainment, _attainment(colocated, rate * vllm_gpus).attainment) for rate in rates
    ]
    apart = next(verdict for verdict in result.searched if len(verdict.placement.pools) == 2)
    return Found(paper, goodput.mean / gpus, apart, best, baseline.mean / vllm_gpus, tuple(curve))


def problem_of(paper: Paper) -> Problem:
    inputs, outputs = Random("0/input"), Random("0/output")
    demand: Demand = demand_of(SHAREGPT.draw(inputs, outputs) for _ in range(4000))
    cluster: Cluster = parse_cluster(["A100-80GB:8"], Shape(nodes=1, per_node=8))
    need = Need(find_model(paper.model), "bfloat16", demand.max_tokens)
    return Problem(need, cluster, demand, paper.slo, objective("goodput_per_gpu", cluster))


def cost_maker(data: Path, system: str, model: str) -> CostMaker:
    """Of the measurements of "distserve" or "vllm"; the host works before the first stage alone."""
    file = data / "distserve" / f"profiler-a100-80g.{system}.json"

    def cost(_: Accelerator, tp: int, pp: int) -> Price | None:
        try:
            measured = read_distserve(file, f"facebook/{model}", tp, pp)
        except InvalidRequest:
            return None
        return Price(replace(measured, host=0.0), HOST_SECONDS) if pp > 1 else Price(measured)

    return cost


def paper_case(paper: Paper, problem: Problem, data: Path, num_requests: int) -> Case:
    """DistServe's placement, one worker of each kind on one node."""
    kinds = _kinds(paper, problem, data, "distserve")
    placement = split_placement(kinds[paper.prefill], kinds[paper.decode], (1, 1), Affinity.NODE, problem.budgets)
    return case_of(problem, placement, num_requests)


def vllm_case(paper: Paper, problem: Problem, data: Path, num_requests: int) -> Case:
    """One colocated worker without chunked prefill."""
    kind = _kinds(paper, problem, data, "vllm")[VLLM_TP[paper.model], 1]
    case = case_of(problem, next(mixed_placements([kind], problem.budgets)), num_requests)
    return replace(case, setup=replace(case.setup, pools=(replace(case.setup.pools[0], phases_apart=True),)))


def table(found: list[Found]) -> str:
    """In Markdown."""
    lines = [
        "| model | the paper's placement: measured / simulated | best apart | share of it | best of all "
        "| colocated vLLM: measured / simulated | ratio: measured / simulated |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        paper = each.paper
        name = f"TP{paper.prefill[0]} PP{paper.prefill[1]} + TP{paper.decode[0]} PP{paper.decode[1]}"
        lines.append(
            f"| {paper.model} | {name}: {paper.distserve:.2f} / {each.placement:.2f} | {_describe(each.best_apart)} "
            f"| {each.placement / each.best_apart.score:.0%} | {_describe(each.best)} | {paper.vllm:.2f} / {each.vllm:.2f} "
            f"| {paper.distserve / paper.vllm:.1f} / {each.placement / each.vllm:.1f} |"
        )
    lines += ["", "| model | req/s per GPU | attainment, DistServe's placement | attainment, vLLM |", "|---|---|---|---|"]
    lines += [
        f"| {each.paper.model} | {rate:.2f} | {first:.0%} | {second:.0%} |"
        for each in found
        for rate, first, second in each.curve
    ]
    return "\n".join(lines)


def _describe(verdict: Verdict) -> str:
    return f"{verdict.score:.2f}: {verdict.placement.name.replace('A100-80GB ', '')}"


def _kinds(paper: Paper, problem: Problem, data: Path, system: str) -> dict[tuple[int, int], WorkerKind]:
    kinds, _ = worker_kinds(problem.cluster, problem.need, problem.budgets, cost_maker(data, system, paper.model))
    return {(kind.tp, kind.pp): kind for kind in kinds}


def _goodput(case: Case, guess: float, options: SearchOptions) -> Goodput:
    return find_goodput(partial(try_rate, case), guess, float("inf"), options.goodput)


def _attainment(case: Case, rate: float) -> Trial:
    return try_rate(case, rate, 0, complete=True)


def _num_gpus(paper: Paper) -> int:
    return paper.prefill[0] * paper.prefill[1] + paper.decode[0] * paper.decode[1]
