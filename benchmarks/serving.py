"""What clients get: TTFT, TPOT, attainment and requests per second of Baton, beside other servers if any are given.

    .venv/bin/python benchmarks/serving.py [--quick] [--baton 1p1d] [--baton mixed] [--model DIR]
    .venv/bin/python benchmarks/serving.py --model DIR --peer pair=http://127.0.0.1:8300 \\
        --start pair='./up.sh' --stop pair='./down.sh'

512 tokens in, 128 out, the 110M Llama with random weights in bfloat16 (or --model, which the peers must serve too). 1p1d is one
prefill and one decode worker of one thread each, mixed one worker of two threads. Loads, over HTTP, each with prompts that no
server has seen before, the same for all systems of a turn:

req_s_c32                  requests per second, 32 at a time, the next as soon as one ends
ttft_ms_p50_r15 ...        Poisson arrivals at 1.5 requests per second
ttft_ms_p50 ... attainment Poisson arrivals at --rate over gRPC, and lone_prefill_ms_p50 before; 1p1d only, first turn only

Figures of 1p1d have these names; those of another system are preceded by its label, and NAME_over_LABEL is Baton's over a
peer's. Attainment is the share of all offered requests with TTFT <= 1 s and TPOT <= 50 ms. With peers every system has three
turns, A B A B ..., and figures are medians over turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from baton.bench.grpc_target import GrpcTarget, ask_model
from baton.bench.metrics import Summary
from baton.bench.prompts import PromptSource
from baton.core.errors import BatonError
from clusters import SLO, lone_prefill, median_ms
from loads import Lengths, Measured, closed, fresh_seed, poisson, warm
from systems import Endpoint, System, add_system_options, chosen_systems, vocab_size

LENGTHS = Lengths()
CONCURRENCY = 32
RATE = 1.5  # of the load whose figures end in _r15
PLAIN = "1p1d"  # the system whose figures have no label
SEEDS_PER_TURN = 10


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of requests."""

    closed: int
    poisson: int
    over_grpc: int


FULL, QUICK = Sizes(64, 90, 60), Sizes(40, 12, 12)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second of the load over gRPC (default: 1.0)")
    parser.add_argument(
        "--requests", type=int, help=f"of the load over gRPC (default: {FULL.over_grpc}, quick {QUICK.over_grpc})"
    )
    parser.add_argument("--turns", type=int, help="of every system (default: 3 with peers, else 1)")
    parser.add_argument("--seed", type=int, help="of prompts and arrivals (default: a new one)")
    add_system_options(parser, [PLAIN])
    arguments = parser.parse_args()
    systems = chosen_systems(parser, arguments, [PLAIN])
    sizes = QUICK if arguments.quick else FULL
    if arguments.requests:
        sizes = replace(sizes, over_grpc=arguments.requests)
    seed, vocabulary = fresh_seed(arguments.seed), vocab_size(arguments)
    print(f"{LENGTHS} tokens, seed {seed}; systems: {', '.join(system.label for system in systems)}")
    values: defaultdict[str, list[float]] = defaultdict(list)
    for turn in range(arguments.turns or (3 if arguments.peer else 1)):
        for system in systems:
            async with system.up() as endpoint:
                figures = {}
                if turn == 0 and system.label == PLAIN:
                    figures = await _over_grpc(endpoint, arguments.rate, sizes.over_grpc, seed)
                figures |= await _over_http(system.label, endpoint, sizes, seed + SEEDS_PER_TURN * turn, vocabulary)
            for name, value in figures.items():
                values[name if system.label == PLAIN else f"{system.label}_{name}"].append(value)
    medians = {name: statistics.median(measured) for name, measured in values.items()}
    print(json.dumps({name: round(value, 4) for name, value in (medians | _ratios(systems, medians)).items()}))


async def _over_http(label: str, endpoint: Endpoint, sizes: Sizes, seed: int, vocabulary: int) -> dict[str, float]:
    """One turn of one system. Every load has its own seed: a prompt that was sent before would hit the prefix cache."""
    await warm(endpoint.target(seed, vocabulary), LENGTHS)
    measured = await closed(endpoint.target(seed + 1, vocabulary), CONCURRENCY, sizes.closed, LENGTHS, seed + 1, SLO)
    figures = _figures(f"{label}, {CONCURRENCY} at a time", measured, f"_c{CONCURRENCY}")
    figures[f"req_s_c{CONCURRENCY}"] = measured.summary.request_rate
    measured = await poisson(endpoint.target(seed + 2, vocabulary), RATE, sizes.poisson, LENGTHS, seed + 2, SLO)
    return figures | _figures(f"{label}, {RATE} requests/s", measured, f"_r{round(10 * RATE)}")


async def _over_grpc(endpoint: Endpoint, rate: float, num_requests: int, seed: int) -> dict[str, float]:
    """A lone prefill, and how much later than that first tokens come under load."""
    model = await ask_model(endpoint.grpc)
    target = GrpcTarget(endpoint.grpc, model.name, PromptSource(seed + 3, model.vocab_size))
    try:
        alone = await lone_prefill(target, LENGTHS.input, 7)
        print(f"a lone prefill of {LENGTHS.input} tokens: TTFT p50 {median_ms(alone)} ms")
        measured = await poisson(target, rate, num_requests, LENGTHS, seed + 3, SLO)
    finally:
        await target.close()
    figures = _figures(f"{PLAIN}, {rate} requests/s over gRPC", measured, "")
    figures |= {"request_rate": measured.summary.request_rate, "lone_prefill_ms_p50": median_ms(alone)}
    return figures | {"ttft_p50_over_lone_prefill": figures["ttft_ms_p50"] / figures["lone_prefill_ms_p50"]}


def _figures(title: str, measured: Measured, suffix: str) -> dict[str, float]:
    """Names end in `suffix`; prints them too. Exits when nothing finished: there is nothing to be said of such a run."""
    summary: Summary = measured.summary
    if summary.ttft is None or summary.tpot is None:
        raise SystemExit(f"{title}: no request finished: {dict(summary.errors)}")
    figures = {
        "ttft_ms_p50": 1000 * summary.ttft.p50,
        "ttft_ms_p99": 1000 * summary.ttft.p99,
        "tpot_ms_p50": 1000 * summary.tpot.p50,
        "tpot_ms_p99": 1000 * summary.tpot.p99,
        "attainment": summary.attainment,
        "output_tok_s": summary.output_token_rate,
    }
    print(
        f"{title}: {summary.num_finished} of {summary.num_offered} in {summary.duration:.1f} s ({summary.request_rate:.2f}/s), "
        f"TTFT p50/p99 {figures['ttft_ms_p50']:.0f}/{figures['ttft_ms_p99']:.0f} ms, "
        f"TPOT {figures['tpot_ms_p50']:.1f}/{figures['tpot_ms_p99']:.1f} ms, attainment {summary.attainment:.3f}",
        flush=True,
    )
    for complaint in measured.complaints:
        print(f"  warning: {complaint}", flush=True)
    return {name + suffix: value for name, value in figures.items()}


def _ratios(systems: Sequence[System], medians: Mapping[str, float]) -> dict[str, float]:
    """Baton's requests per second over each peer's."""
    name = f"req_s_c{CONCURRENCY}"
    return {
        f"{mine}_over_{peer.label}": medians[mine] / medians[f"{peer.label}_{name}"]
        for system in systems
        if system.topology is not None
        for mine in [name if system.label == PLAIN else f"{system.label}_{name}"]
        for peer in systems
        if peer.topology is None
    }


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except BatonError as error:
        raise SystemExit(str(error)) from error
