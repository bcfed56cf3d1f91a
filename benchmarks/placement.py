"""How long a placement search takes on the cores at hand, and whether its goodput holds in a long run.

    .venv/bin/python benchmarks/placement.py [--quick] [--only NAME ...]

algorithm1_66b_4x8_s   OPT-66B on four nodes of eight A100, ShareGPT-like lengths, 300 requests a simulation: KV may cross the
                       network (Algorithm 1 of DistServe)
algorithm2_66b_1x8_s   OPT-66B on one node of eight: KV stays within it (Algorithm 2)
mixed_128_s            OPT-66B on 64 H100 and 64 A100, goodput per dollar
NAME_error             without --quick: the goodput of the winner against that of a run of 10,000 requests, relative

Seconds are those of the search alone, from no processes to the verdicts. --quick takes 100 requests, one seed. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from functools import partial
from random import Random

from baton.core.slo import Slo
from baton.placement.cluster import Shape, parse_cluster
from baton.placement.demand import demand_of
from baton.placement.executors import executor
from baton.placement.goodput import GoodputOptions, find_goodput
from baton.placement.hardware import Accelerator
from baton.placement.model_shape import find_model
from baton.placement.objective import objective
from baton.placement.problem import Problem, SearchOptions, SearchResult
from baton.placement.roofline import roofline_cost
from baton.placement.search import case_of, search
from baton.placement.space import Need, Price
from baton.placement.trial import try_rate
from baton.simulator.workload.published import SHAREGPT

MODEL = find_model("OPT-66B")
SLO = Slo(2.5, 0.15, 0.9)
LONG_RUN = 10_000
QUICK = SearchOptions(num_requests=100, goodput=GoodputOptions((0,), 0.05))


@dataclass(frozen=True, slots=True)
class Scenario:
    """One search."""

    name: str
    gpus: tuple[str, ...]
    goal: str = "goodput_per_gpu"


SCENARIOS = (
    Scenario("algorithm1_66b_4x8", ("A100-80GB:32",)),
    Scenario("algorithm2_66b_1x8", ("A100-80GB:8",)),
    Scenario("mixed_128", ("H100:64", "A100-80GB:64"), "per_dollar"),
)


def cost(device: Accelerator, tp: int, pp: int) -> Price:
    return Price(roofline_cost(MODEL, device, tp, pp))


def problem_of(scenario: Scenario) -> Problem:
    inputs, outputs = Random("input"), Random("output")
    demand = demand_of(SHAREGPT.draw(inputs, outputs) for _ in range(4096))
    cluster = parse_cluster(scenario.gpus, Shape(per_node=8))
    return Problem(Need(MODEL, "bfloat16", 2048), cluster, demand, SLO, objective(scenario.goal, cluster))


def long_run_error(result: SearchResult) -> float:
    """Of the winner's goodput, against one long stream."""
    best = result.best
    if best is None:
        raise SystemExit("no winner: nothing to compare")
    simulate_once = partial(try_rate, case_of(result.problem, best.placement, LONG_RUN))
    once = GoodputOptions((99,), 0.01)
    return best.rate / find_goodput(simulate_once, best.rate, best.candidate.bound, once, near=True).mean - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 requests a simulation, one seed")
    parser.add_argument("--only", nargs="+", choices=[scenario.name for scenario in SCENARIOS])
    arguments = parser.parse_args()
    options = QUICK if arguments.quick else SearchOptions()
    figures: dict[str, float] = {}
    for scenario in SCENARIOS:
        if arguments.only and scenario.name not in arguments.only:
            continue
        problem = problem_of(scenario)
        began = time.perf_counter()
        with executor(len(os.sched_getaffinity(0))) as runner:
            result = search(problem, cost, options, runner)
        figures[f"{scenario.name}_s"] = round(time.perf_counter() - began, 2)
        best = result.best
        winner = f"{best.placement.name}: {best.score:.4g} {problem.objective.unit}" if best else "none"
        print(
            f"{scenario.name}: {figures[f'{scenario.name}_s']} s, {result.num_simulations} simulations; best {winner}", flush=True
        )
        if not arguments.quick:
            figures[f"{scenario.name}_error"] = round(long_run_error(result), 4)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
