"""How fast the simulator is: requests per second of one core, and a day of traffic on 64 GPUs.

    .venv/bin/python benchmarks/simulator.py [--quick] [--data FOLDER]

requests_per_s_core  2 prefill and 2 decode workers at about 70 % of what they can do, prompts of 500 tokens, 200 tokens out
                     each; per second of processor time, the best of three runs (one with --quick)
steps_ratio          how much longer the same takes step by step
day_s                processor seconds for the Azure conversation trace (azure2023/AzureLLMInferenceTrace_conv.csv in FOLDER)
                     24 times in a row at four times its rate on 32 prefill and 32 decode workers; --quick runs one time and
                     multiplies
day_growth_mb        what the largest memory of the process grew by after the first third of that day: by then every worker
                     remembers as many ended handoffs as it ever will

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from baton.core.view import Role
from baton.simulator.cost import LinearCost
from baton.simulator.records import RequestOutcome
from baton.simulator.setup import ClusterSetup, NetworkSetup, PoolSetup
from baton.simulator.simulate import simulate
from baton.simulator.workload.planned import PlannedRequest
from baton.simulator.workload.traces import read_trace, repeat_trace

TRACE = "azure2023/AzureLLMInferenceTrace_conv.csv"
REPEATS, SPEED = 24, 4.0
RATE = 28.0  # requests/s: 500 tokens take a prefill worker about 50 ms

# About a 13B model on an A100: 90 us a prompt token, 12 ms and more a decode step.
COST = LinearCost(step=0.005, token=9e-5, decode_context=3e-7, decode_row=2e-5)
NETWORK = NetworkSetup(kv_bytes_per_token=819_200, bandwidth=25e9, latency=1e-4, control=5e-4)


def cluster(num_prefill: int, num_decode: int) -> ClusterSetup:
    pools = [PoolSetup(role, COST, number, 3000) for role, number in ((Role.PREFILL, num_prefill), (Role.DECODE, num_decode))]
    return ClusterSetup(tuple(pools), NETWORK)


def poisson(count: int) -> Iterator[PlannedRequest]:
    draws, at = Random(0), 0.0
    for index in range(count):
        at += draws.expovariate(RATE)
        yield PlannedRequest(index, at, 500, 200)


def requests_per_second(count: int, fast: bool) -> float:
    began = time.process_time()
    result = simulate(cluster(2, 2), poisson(count), fast=fast)
    seconds = time.process_time() - began
    uses = ", ".join(f"{use.worker} {use.busy / result.duration:.0%} busy" for use in result.workers)
    rows = result.workers[-1].decode_row_seconds / result.workers[-1].busy
    print(f"{count} requests in {seconds:.2f} s of processor time, {result.events} events; {uses}; {rows:.0f} rows a decode step")
    return count / seconds


def run_day(trace: tuple[PlannedRequest, ...], repeats: int) -> dict[str, float]:
    num_ended, num_failed, early = 0, 0, 0.0

    def count(outcome: RequestOutcome) -> None:
        nonlocal num_ended, num_failed, early
        num_ended += 1
        num_failed += not outcome.ok
        if num_ended == repeats * len(trace) // 3:
            early = peak_mb()

    began = time.process_time()
    result = simulate(cluster(32, 32), repeat_trace(trace, repeats, SPEED), sink=count)
    seconds = time.process_time() - began
    print(
        f"{num_ended} requests, {num_failed} of them failed, {result.duration / 3600:.2f} hours, in {seconds:.1f} s of "
        f"processor time, {num_ended / seconds:.0f} requests/s; {peak_mb():.0f} MB, {early:.0f} MB after a third"
    )
    return {"day_s": seconds * REPEATS / repeats, "day_growth_mb": peak_mb() - early}


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run of each")
    parser.add_argument("--data", type=Path, help="folder with the published traces; without it there is no day_s")
    arguments = parser.parse_args()
    runs, count = (1, 3000) if arguments.quick else (3, 10_000)
    fastest = max(requests_per_second(count, True) for _ in range(runs))
    figures = {"requests_per_s_core": fastest, "steps_ratio": fastest / requests_per_second(500, False)}
    path = None if arguments.data is None else arguments.data / TRACE
    if path is None or not path.exists():
        print(f"no day_s: {path or '--data was not given'}{' does not exist' if path else ''}")
    else:
        figures |= run_day(read_trace(path, "azure"), 1 if arguments.quick else REPEATS)
    print(json.dumps({name: round(figure, 2) for name, figure in figures.items()}))


if __name__ == "__main__":
    main()
