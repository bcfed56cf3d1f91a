"""What the tests of a search share: a small problem whose steps cost what a line says, so that simulations are quick."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from baton.core.slo import Slo
from baton.placement.cluster import Shape, parse_cluster
from baton.placement.demand import demand_of
from baton.placement.goodput import GoodputOptions
from baton.placement.hardware import Accelerator
from baton.placement.model_shape import ModelShape
from baton.placement.objective import objective
from baton.placement.problem import Problem, SearchOptions
from baton.placement.space import Budgets, CostMaker, Need, Price
from baton.simulator.cost import LinearCost

MODEL = ModelShape("tiny", 4, 512, 1024, 8, 8, 64, 1000, 4096)
QUICK = SearchOptions(num_requests=60, goodput=GoodputOptions((0, 1), 0.05))


def linear_cost(device: Accelerator, tp: int, pp: int) -> Price:
    """Prefill 20 us a token, decode steps of 4 ms and a little per row; TP helps less than it costs."""
    speed = tp**0.8 * device.flops_16 / 312e12
    return Price(LinearCost(2e-3, token=2e-5 / speed / pp, floor_tokens=16, decode_row=2e-4 / speed / pp, stages=pp))


@pytest.fixture(scope="session")
def cost() -> CostMaker:
    return linear_cost


@pytest.fixture(scope="session")
def options() -> SearchOptions:
    return QUICK


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    def make(
        gpus: tuple[str, ...] = ("A100-80GB:2",),
        slo: Slo = Slo(0.1, 0.02, 0.9),
        goal: str = "goodput_per_gpu",
        rate: float | None = None,
        per_node: int = 2,
        network: float = 50e9,
        lengths: tuple[tuple[int, int], ...] = ((200, 8), (400, 12), (100, 4)),
    ) -> Problem:
        cluster = parse_cluster(gpus, Shape(per_node=per_node, network=network))
        budgets = Budgets(chunked_step_tokens=128, colocated_step_tokens=2048, decode_seqs=32)
        return Problem(Need(MODEL, "bfloat16", 512), cluster, demand_of(lengths), slo, objective(goal, cluster, rate), budgets)

    return make
