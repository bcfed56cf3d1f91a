"""Re-planning end to end, from what a cluster remembers to the answer; the cluster is made of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from baton.core.errors import InvalidRequest
from baton.core.observed import ObservedRequest, ObservedStep
from baton.core.shape import StepShape
from baton.core.slo import Slo
from baton.core.topology import ModelSpec, PoolSpec, Topology
from baton.core.view import Role
from baton.placement.executors import Inline
from baton.placement.goodput import GoodputOptions
from baton.placement.model_shape import ModelShape
from baton.placement.problem import SearchOptions
from baton.placement.replan import Replan, Seen, doubts_about, replan, same_division
from baton.simulator.cost import LinearCost

MODEL = ModelShape("tiny", 4, 512, 1024, 8, 8, 64, 1000, 4096)
OPTIONS = SearchOptions(num_requests=40, goodput=GoodputOptions((0, 1, 2), 0.05), max_finalists=2)
SLO = Slo(0.2, 0.02, 0.9)
COST = LinearCost(4e-3, token=1e-4, floor_tokens=8, decode_row=2e-3, decode_context=1e-7)
POOL = PoolSpec(Role.MIXED, accelerator="A100-80GB", kv_memory_bytes=8 << 30, max_step_tokens=512, max_num_seqs=32)


def steps() -> tuple[ObservedStep, ...]:
    prompts = [StepShape(1, tokens, tokens * (tokens + 1) // 2, tokens, sampled=1) for tokens in range(20, 500, 20)]
    batches = [StepShape(decode_rows=rows, decode_context=rows * 300, sampled=rows) for rows in range(1, 33)]
    return tuple(ObservedStep(shape, COST.seconds(shape), COST.seconds(shape)) for shape in (*prompts, *batches))


def requests(rate: float, lengths: tuple[int, int], ttft: float = 0.012, tpot: float = 0.007) -> tuple[ObservedRequest, ...]:
    random, at, found = Random(5), -3.0, []
    for _ in range(300):
        found.append(ObservedRequest(at, *lengths, 0, True, ttft, tpot))
        at -= random.expovariate(rate)
    return tuple(found)


def running(prefill: int, decode: int) -> Topology:
    pools = tuple(replace(POOL, role=role, replicas=count) for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)))
    return Topology("chat", ModelSpec("/models/tiny", max_model_len=1024), pools, SLO)


def ask(topology: Topology, asked: tuple[ObservedRequest, ...], minimal: float = 0.1) -> Replan:
    seen = steps()
    return replan(Seen(topology, asked, {pool.role: seen for pool in topology.pools}), MODEL, OPTIONS, Inline(), minimal=minimal)


@pytest.fixture(scope="module")
def lopsided() -> Replan:
    """Two prefill workers and one to decode, and answers that take much longer than prompts."""
    return ask(running(2, 1), requests(3.0, (60, 24)))


def test_a_lopsided_cluster_is_changed(lopsided: Replan) -> None:
    assert not lopsided.doubts
    assert lopsided.alternative is not None
    assert lopsided.gain is not None
    assert lopsided.change
    assert lopsided.gain.mean > lopsided.gain.uncertainty > 0
    chosen = lopsided.alternative.topology
    assert not same_division(chosen, running(2, 1))
    assert sum(pool.replicas * pool.tensor_parallel * pool.pipeline_parallel for pool in chosen.pools) <= 3
    assert chosen.router == running(2, 1).router
    assert chosen.cluster == "chat"


def test_after_the_change_there_is_nothing_to_change(lopsided: Replan) -> None:
    """No flapping: the same traffic on what was advised."""
    assert lopsided.alternative is not None
    again = ask(lopsided.alternative.topology, requests(3.0, (60, 24)))
    assert not again.change


def test_a_gain_that_is_too_small_changes_nothing(lopsided: Replan) -> None:
    assert lopsided.gain is not None
    assert not replace(lopsided, minimal=lopsided.gain.mean * 1.01).change
    assert not replace(lopsided, gain=replace(lopsided.gain, uncertainty=lopsided.gain.mean)).change


def test_a_simulation_that_is_wrong_is_not_believed(lopsided: Replan) -> None:
    seen, simulated = lopsided.workload, lopsided.simulated
    assert doubts_about(seen, simulated) == ""
    assert "attainment is 50% and the simulation says" in doubts_about(replace(seen, attainment=0.5), simulated)
    assert "median TTFT is 100 ms" in doubts_about(replace(seen, ttft=0.1), simulated)
    assert "median TPOT is 25 ms" in doubts_about(replace(seen, tpot=0.025), simulated)
    assert not replace(lopsided, doubts="something").change
    overloaded = replace(seen, attainment=0.3, ttft=40.0)
    late = replace(simulated, report=replace(simulated.report, attainment=0.25))
    assert doubts_about(overloaded, late) == ""  # how late it is says how long it has been so


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pool: replace(pool, accelerator="cpu", threads=1 + (pool.role is Role.DECODE)), "1 and 2 threads"),
        (lambda pool: replace(pool, accelerator="Abacus"), "'Abacus' is not known"),
    ],
)
def test_what_cannot_be_compared_is_said(change: Callable[[PoolSpec], PoolSpec], words: str) -> None:
    topology = running(1, 1)
    with pytest.raises(InvalidRequest, match=words):
        ask(replace(topology, pools=tuple(map(change, topology.pools))), requests(3.0, (60, 24)))
