"""TTFT, TPOT and attainment of one prefill and one decode worker under an open-loop Poisson load.

    .venv/bin/python benchmarks/serving.py [--quick] [--rate 1.0] [--requests 60]
    .venv/bin/python benchmarks/serving.py --peer http://127.0.0.1:8100 --model NAME    # the same load on another server

110M Llama, bf16, random weights, 512 tokens in, 128 out, one thread per worker. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json

from baton.bench.driver import Target, run_load
from baton.bench.grpc_target import GrpcTarget, ask_model
from baton.bench.http_target import HttpTarget, ask_models
from baton.bench.metrics import Summary, client_warning, summarise
from baton.bench.prompts import PromptSource
from baton.bench.workload import Length, poisson_workload
from clusters import SLO, lone_prefill, median_ms, one_prefill_one_decode, serving

INPUT, OUTPUT = 512, 128


async def main() -> None:
    arguments = _arguments()
    num_requests = 20 if arguments.quick else arguments.requests
    if arguments.peer:
        name = arguments.model or (await ask_models(arguments.peer))[0]
        target = HttpTarget(arguments.peer, name, PromptSource(seed=arguments.seed))
        summary = await _load(target, arguments.rate, num_requests, arguments.seed)
        print(json.dumps(_figures(summary)))
        return
    async with serving(one_prefill_one_decode()) as cluster:
        model = await ask_model(cluster.grpc)
        target = GrpcTarget(cluster.grpc, model.name, PromptSource(seed=arguments.seed, vocab_size=model.vocab_size))
        alone = await lone_prefill(target, INPUT, 7)
        print(f"a lone prefill of {INPUT} tokens: TTFT p50 {median_ms(alone)} ms")
        summary = await _load(target, arguments.rate, num_requests, arguments.seed)
        await target.close()
    figures = _figures(summary) | {"lone_prefill_ms_p50": median_ms(alone)}
    figures["ttft_p50_over_lone_prefill"] = round(figures["ttft_ms_p50"] / figures["lone_prefill_ms_p50"], 3)
    print(json.dumps(figures))


async def _load(target: Target, rate: float, num_requests: int, seed: int) -> Summary:
    workload = poisson_workload(
        rate, Length("fixed", INPUT, INPUT), Length("fixed", OUTPUT, OUTPUT), num_requests=num_requests, seed=seed
    )
    summary = summarise(await run_load(target, workload), SLO)
    if warning := client_warning(summary, SLO):
        print(f"warning: {warning}")
    print(f"{summary.num_finished} of {summary.num_offered} requests finished in {summary.duration:.1f} s")
    return summary


def _figures(summary: Summary) -> dict[str, float]:
    if summary.ttft is None or summary.tpot is None:
        raise SystemExit(f"no request finished: {summary.errors}")
    return {
        "ttft_ms_p50": round(1000 * summary.ttft.p50, 1),
        "ttft_ms_p99": round(1000 * summary.ttft.p99, 1),
        "tpot_ms_p50": round(1000 * summary.tpot.p50, 2),
        "tpot_ms_p99": round(1000 * summary.tpot.p99, 2),
        "attainment": round(summary.attainment, 4),
        "request_rate": round(summary.request_rate, 3),
        "output_tok_s": round(summary.output_token_rate, 1),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 requests")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", help="base URL of another OpenAI-compatible server")
    parser.add_argument("--model", default="", help="with --peer: the model's name there (default: the first it lists)")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
