"""How a fixed number of machines is best split between prefill and decode, by Splitwise's own measurements.

Every split of `machines` equal machines of eight GPUs is searched for its goodput with the simulator. Two kinds of traffic:
code (long prompts, answers of a few tokens) and the conversation trace of Azure 2023. A machine holds as many tokens of KV as fit
beside the weights, its decode batch is at most the 64 rows that were measured, prompts are prefilled whole, KV moves
over the InfiniBand of the machines (taken as 200 Gbit/s a machine with A100, 400 with H100).

The objectives are those of the paper (90% of requests within 3 times the TTFT and 1.5 times the time between tokens
of a lone request on A100s), which are relative to every request, made absolute: of a prompt as long as nine of ten are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from baton.core.shape import StepShape
from baton.core.slo import Slo
from baton.core.view import Role
from baton.placement.demand import Demand, demand_of
from baton.placement.goodput import Goodput, GoodputOptions, find_goodput
from baton.placement.splitwise import SplitwiseCost, read_splitwise
from baton.placement.trial import Case, try_rate
from baton.simulator.setup import ClusterSetup, NetworkSetup, PoolSetup
from baton.simulator.workload.published import SPLITWISE_CODE
from baton.simulator.workload.traces import read_trace

BLOCK_SIZE = 32
MAX_ROWS = 64
MAX_PROMPT = 8192
_GIGA = 1e9
_MEMORY = 8 * 80 * _GIGA * 0.9


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on eight GPUs. kv_bytes of one token; room: tokens of KV beside the weights; link in bytes/s."""

    name: str
    cost: SplitwiseCost
    kv_bytes: float
    room: int
    link: float


@dataclass(frozen=True, slots=True)
class Split:
    """`prefill` and `decode` machines and what they reach, requests/s."""

    prefill: int
    decode: int
    goodput: Goodput

    @property
    def name(self) -> str:
        return f"{self.prefill}P{self.decode}D"


_WEIGHTS = {"llama2-70b": 2 * 69 * _GIGA, "bloom-176b": 2 * 176 * _GIGA}
_KV_BYTES = {"llama2-70b": 2 * 2 * 80 * 8 * 128.0, "bloom-176b": 2 * 2 * 70 * 14336.0}  # K and V, 16 bits, layers, heads x width
_LINKS = {"a100-80gb": 25 * _GIGA, "h100-80gb": 50 * _GIGA}


def machine(data: Path, model: str, hardware: str) -> Machine:
    """As measured; `data` is the folder of `splitwise`."""
    cost = read_splitwise(data / "splitwise" / "perf_model.csv", model, hardware)
    room = int((_MEMORY - _WEIGHTS[model]) / _KV_BYTES[model])
    return Machine(f"{model} on {hardware}", cost, _KV_BYTES[model], room, _LINKS[hardware])


def code(seed: int = 0, num_requests: int = 4000) -> Demand:
    """Drawn from the published quantiles."""
    inputs, outputs = Random(f"{seed}/input"), Random(f"{seed}/output")
    return demand_of(SPLITWISE_CODE.draw(inputs, outputs) for _ in range(num_requests))


def conversation(data: Path) -> Demand:
    """The trace's own pairs; the one prompt in 600 that is longer than what was measured is cut."""
    trace = read_trace(data / "azure2023" / "AzureLLMInferenceTrace_conv.csv", "azure")
    return demand_of((min(request.input_tokens, MAX_PROMPT), request.output_tokens) for request in trace)


def objectives(data: Path, model: str, demand: Demand) -> Slo:
    """The paper's, of a lone request on A100s whose prompt is as long as that of 90% of the demand at most."""
    alone = machine(data, model, "a100-80gb").cost
    prompt = sorted(prompt for prompt, _ in demand.mix)[int(0.9 * len(demand.mix))]
    ttft = alone.seconds(StepShape(prefill_rows=1, prefill_tokens=prompt))
    return Slo(ttft=3 * ttft, tpot=1.5 * alone.decode_seconds(1, prompt, 1), attainment=0.9)


def splits(of: Machine, machines: int, demand: Demand, slo: Slo, num_requests: int, options: GoodputOptions) -> list[Split]:
    """All splits of `machines`, from one prefill machine to one decode machine."""
    found: list[Split] = []
    for prefill in range(1, machines):
        guess = found[-1].goodput.mean if found and found[-1].goodput.mean > 0 else _guess(of, demand, prefill)
        case = Case(setup(of, prefill, machines - prefill, slo), demand, slo, num_requests)
        goodput = find_goodput(partial(try_rate, case), guess, float("inf"), options)
        found.append(Split(prefill, machines - prefill, goodput))
    return found


def best(found: Sequence[Split]) -> Split:
    return max(found, key=lambda split: split.goodput.mean)


def setup(of: Machine, prefill: int, decode: int, slo: Slo) -> ClusterSetup:
    """Every machine is a node."""
    pools = tuple(
        PoolSetup(
            role,
            of.cost,
            replicas=replicas,
            num_blocks=of.room // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_step_tokens=MAX_PROMPT,
            max_num_seqs=MAX_ROWS,
            phases_apart=True,
            nodes=tuple(range(first, first + replicas)),
        )
        for role, replicas, first in ((Role.PREFILL, prefill, 0), (Role.DECODE, decode, prefill))
    )
    return ClusterSetup(pools, NetworkSetup(of.kv_bytes, of.link, of.link, 1e-4, 2e-4), slo)


def _guess(of: Machine, demand: Demand, prefill: int) -> float:
    tokens = round(demand.mean_input)
    return 0.7 * prefill / of.cost.seconds(StepShape(prefill_rows=1, prefill_tokens=tokens))
